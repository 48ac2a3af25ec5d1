"""When a run is over."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from xpeer.errors import Reason
from xpeer.health import Health
from xpeer.manifest.round import Round
from xpeer.round import Exchanged
from xpeer_daemon.closing import Closing, closing_windows
from xpeer_daemon.member import _closing
from xpeer_daemon.outcomes import Outcomes
from xpeer_daemon.store import Store


@pytest.mark.parametrize(("peers", "windows"), [(1, 0), (2, 2), (3, 4), (4, 4), (5, 6), (8, 6)])
def test_twice_the_logarithm_of_windows(peers: int, windows: int):
    assert closing_windows(peers, None) == windows
    assert closing_windows(peers, 1) == 1


def test_a_lone_peer_has_nobody_to_mix_with():
    assert Closing(5, None).finished([])


@pytest.mark.parametrize("phase", ["training", "waiting", "fetching"])
def test_nobody_finishes_while_somebody_trains(phase: str):
    closing = Closing(1, 0)
    assert not closing.finished(["closing", phase])
    assert closing.finished(["closing", "budget-spent", "finished"])


def test_every_fragment_has_to_be_mixed_often_enough():
    closing = Closing(2, None)
    for slot, (merged, finished) in enumerate([(0, False), (0, False), (1, False), (1, True)]):
        closing.merged(merged, slot)
        assert closing.finished(["closing"]) is finished


def test_an_exchange_whose_meeting_was_too_small_mixed_nothing(tmp_path: Path):
    """A trimmed mean of five needs all of them: two exchanges may succeed, and none merges."""
    closing = Closing(1, 2)
    view: Any = SimpleNamespace(has_ended=lambda: True, still_training=lambda: [])
    agreement: Any = SimpleNamespace(slot=7, fragment=0, peer_id="b")
    with contextlib.closing(Store.open(tmp_path / "state.sqlite")) as store:
        outcomes = Outcomes("ab" * 32, view, Health(lambda: 0.0), store, closing)
        outcomes.exchanged(agreement, Exchanged(0.1), 1.0)
        outcomes.exchanged(agreement, Exchanged(0.1), 1.0)
        outcomes.skipped("", 7, Reason.GROUP_TOO_SMALL, "3 of 5 came")
    assert not closing.finished(["closing"])


@pytest.mark.parametrize(
    ("rules", "alone_with"),
    [
        (Round(), 0),
        (Round(group=5, masks=True), 3),
        (Round(group=5, combiner="trimmed-mean"), 1),
        (Round(group=0, combiner="trimmed-mean", trim=2), 3),
    ],
)
def test_too_few_to_merge_anything_are_finished(rules: Round, alone_with: int):
    closing = _closing(SimpleNamespace(round=rules))  # type: ignore[arg-type] # its round is all
    assert closing.finished(["closing"] * alone_with)
    assert not closing.finished(["closing"] * (alone_with + 1))
