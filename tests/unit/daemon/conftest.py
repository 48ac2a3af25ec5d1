"""For tests of conditions: a node that has three partners."""

from __future__ import annotations

import pytest

from tests.unit.daemon.fakes import ALPHA, BETA, GAMMA, FakeNode


@pytest.fixture
def fake() -> FakeNode:
    return FakeNode(ALPHA, BETA, GAMMA)
