"""For tests of the training loop: a clock that they set."""

from __future__ import annotations

import pytest

from tests.unit.training.clocks import Clock
from xpeer.mixing import exchanges, in_flight
from xpeer.training import learner, loop, measuring, pacing, timings


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What the loop and its meetings take for the time."""
    made = Clock()
    for module in (exchanges, learner, loop, measuring, pacing, in_flight, timings):
        monkeypatch.setattr(module, "time", made)
    return made
