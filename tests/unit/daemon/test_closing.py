"""When a run is over."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from xpeer.manifest import Round
from xpeer_daemon.closing import Closing, closing_windows
from xpeer_daemon.member import _closing


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
    for merged, finished in [(0, False), (0, False), (1, False), (1, True)]:
        closing.merged(merged)
        assert closing.finished(["closing"]) is finished


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
