"""For tests of the training loop: a clock that they set. For tests of text: a small shard."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.training.clocks import Clock
from tests.unit.training.shards import Node
from xpeer.mixing import exchanges, in_flight
from xpeer.training import (
    document,
    learner,
    listing,
    loop,
    measuring,
    pacing,
    record_view,
    room,
    timings,
    token_cache,
    tokenising,
    tokens,
)

SMALL = {"FILE_TOKENS": 700, "BATCH_CHARACTERS": 900, "BATCH_EVENTS": 5, "_ROWS": 3}
BLOCKS = {
    token_cache: {"_BLOCK": 3},
    listing: {"_BLOCK": 5},
    document: {"_BLOCK": 3},
    record_view: {"_BLOCK": 7, "_PIECES": 4},
    room: {"_SMALL": 16, "_WAITING": 16},
}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What the loop and its meetings take for the time."""
    made = Clock()
    for module in (exchanges, learner, loop, measuring, pacing, in_flight, timings):
        monkeypatch.setattr(module, "time", made)
    return made


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many files of tokens, many batches, many parts, many blocks; all arrays are in files."""
    for module, values in {tokenising: SMALL, **BLOCKS}.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(tokens, "PIECE", 600)
