"""For tests of the slot clock: one that has a partner."""

from __future__ import annotations

import pytest

from tests.unit.gossip.rigs import Rig


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    return Rig(monkeypatch)
