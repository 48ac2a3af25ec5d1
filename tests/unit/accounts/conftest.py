"""What tests of accounts share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.accounts.machines import Machine


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine with a register, and no home yet."""
    return Machine(tmp_path / "machine")
