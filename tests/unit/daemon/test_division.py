"""When a shared corpus is divided anew, and by which speeds."""

from __future__ import annotations

import pytest

from xpeer_daemon.division import EVERY_S, STABLE_S, Shares
from xpeer_daemon.throughput import SPAN_S, Throughput


class Rig:
    def __init__(self, *, by_speed: bool = True) -> None:
        self.members = {"a": 100.0, "b": 100.0}
        self.now_s = 1000.0
        self.shares = Shares(lambda: dict(self.members), lambda: self.now_s, by_speed=by_speed)
        self.shares.divide()

    def looks(self, count: int) -> list[bool]:
        found = []
        for _ in range(count):
            self.now_s += STABLE_S
            found.append(self.shares.check_outdated())
        return found


def test_members_that_stay_as_they_are_keep_their_shares():
    assert not any(Rig().looks(5))


@pytest.mark.parametrize("by_speed", [True, False])
def test_a_member_that_came_and_stayed_gets_a_share(by_speed: bool):
    rig = Rig(by_speed=by_speed)
    rig.looks(1)
    rig.members["c"] = 0.0
    assert rig.looks(2) == [False, True]
    assert rig.shares.divide() == rig.members
    assert not any(rig.looks(3))


def test_one_that_comes_and_goes_moves_nothing():
    rig = Rig()
    rig.looks(1)
    rig.members["c"] = 100.0
    assert rig.looks(1) == [False]
    del rig.members["c"]
    assert not any(rig.looks(3))


def test_a_speed_that_changed_for_good_moves_the_shares_after_a_while():
    rig = Rig()
    rig.looks(1)
    rig.members["b"] = 30.0
    while rig.now_s + STABLE_S < 1000.0 + EVERY_S:
        assert rig.looks(1) == [False]
    assert True in rig.looks(2)


def test_the_first_speeds_that_are_known_move_the_shares_soon():
    rig = Rig()
    rig.members = {"a": 0.0, "b": 0.0}
    rig.shares.divide()
    rig.looks(1)
    rig.members = {"a": 100.0, "b": 0.0}
    assert rig.looks(2) == [False, False]
    rig.members = {"a": 100.0, "b": 300.0}
    assert rig.looks(2) == [False, True]


def test_a_small_change_of_speed_moves_nothing():
    rig = Rig()
    rig.members["b"] = 110.0
    rig.now_s += EVERY_S
    assert not any(rig.looks(5))


def test_under_privacy_speeds_move_nothing():
    rig = Rig(by_speed=False)
    rig.members["b"] = 1.0
    rig.now_s += EVERY_S
    assert not any(rig.looks(5))


# ---- what is measured --------------------------------------------------------------------------


def run(measured: Throughput, steps_per_s: float, spans: int, start: tuple[int, float]) -> float:
    step, now_s = start
    for _ in range(10 * spans):
        now_s += SPAN_S / 10
        measured.observe(int(step + steps_per_s * (now_s - start[1])), now_s, 0.0)
    return now_s


def test_throughput_is_published_in_coarse_steps():
    measured = Throughput(tokens_per_step=100)
    run(measured, 10.0, 1, (0, 0.0))
    assert measured.published == 0.0
    measured = Throughput(tokens_per_step=100)
    run(measured, 10.0, 4, (0, 0.0))
    assert measured.published == 2.0**10
    run(measured, 10.8, 8, (10_000, 10_000.0))
    assert measured.published == 2.0**10  # hardly faster
    run(measured, 3.0, 8, (100_000, 100_000.0))
    assert measured.published == pytest.approx(300, rel=0.1)


def test_time_that_was_spent_waiting_does_not_count():
    measured = Throughput(tokens_per_step=100)
    measured.observe(0, 0.0, 0.0)
    measured.observe(600, 2 * SPAN_S, SPAN_S)
    assert measured.published == pytest.approx(1000, rel=0.1)


def test_a_restart_or_a_pause_begins_a_new_measurement():
    measured = Throughput(tokens_per_step=100)
    measured.observe(100, 0.0, 0.0)
    measured.observe(50, SPAN_S, 0.0)
    assert measured.published == 0.0
    measured.interrupt()
    measured.observe(60, 10 * SPAN_S, 0.0)
    measured.observe(660, 11 * SPAN_S, 0.0)
    assert measured.published == pytest.approx(1000, rel=0.1)
