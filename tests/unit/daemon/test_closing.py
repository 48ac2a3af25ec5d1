"""When a run is over."""

from __future__ import annotations

import pytest

from xpeer_daemon.closing import Closing, closing_windows


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
