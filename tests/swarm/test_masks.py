"""Masked groups between whole daemons: three peers end at one model; a dead one costs its slots."""

from __future__ import annotations

import os
import signal

import pytest

from tests.swarm.test_daemons import LOOPBACK, Swarm, swarm
from xpeer.errors import Reason
from xpeer.status import Status

__all__ = ["swarm"]  # the fixture
pytestmark = pytest.mark.timeout(300)
MASKED = {"round__masks": "true", "round__group": 3, "round__fragments": 2}
SLOW = {"XPEER_TRAINING_THROTTLE": "0.1"}


def found_and_join(swarm: Swarm, names: list[str], **fields: object) -> None:
    """The first of the names founds; all wait for one another."""
    first, *others = names
    fixed = {"XPEER_TRAINING_MIN_PEERS": str(len(others)), **SLOW}
    swarm.bootstrap(swarm.found(first, **MASKED, **fields))
    swarm.start(first, "--bootstrap", swarm.seed, **fixed)
    for name in others:
        swarm.join(first, name, **fixed)


def too_small(status: Status) -> int:
    return status.exchanges_skipped.get(Reason.GROUP_TOO_SMALL, 0)


def test_three_peers_end_at_one_model(swarm: Swarm):
    found_and_join(swarm, ["a", "b", "c"], end__steps=20)
    for name in "abc":
        ended = swarm.until(name, lambda s: s.state == "finished", 200)
        assert ended.progress.step == 20
        assert ended.progress.merges >= 4  # each fragment twice
        assert ended.trainer_restarts == 0
        # a payload of 16 bits and a check of 32 for every 128 values
        assert ended.compression_ratio == pytest.approx(32 / 16.25, abs=0.02)
        assert ended.progress.consensus_distance is not None
        assert ended.progress.consensus_distance < 0.05
        assert Reason.WRONG_COMMITMENT not in ended.exchanges_failed
        assert Reason.OUT_OF_RANGE not in ended.exchanges_failed


def test_a_member_that_dies_stops_nobody_and_is_met_again(swarm: Swarm):
    found_and_join(swarm, ["a", "b", "c"], end__steps=100_000)
    for name in "abc":
        swarm.until(name, lambda s: s.exchanges_done >= 4, 120)
    killed = swarm.until("b", lambda s: s.last_checkpoint_age_s is not None)
    os.kill(killed.pid, signal.SIGKILL)
    small = 5 + too_small(swarm.until("a", lambda s: True))
    alone = swarm.until("a", lambda s: too_small(s) >= small)
    trained = alone.progress.step + 5  # two are left: they train, and show each other nothing
    later = swarm.until("a", lambda s: s.progress.step >= trained)
    before = swarm.until("c", lambda s: s.progress.step >= trained).exchanges_done
    assert later.exchanges_done - alone.exchanges_done <= 2  # one group, on its way at that time
    swarm.start("b", "--bootstrap", "--listen", LOOPBACK, "--shard", swarm.shard("b"), **SLOW)
    swarm.until("b", lambda s: s.exchanges_done >= 4, 120)
    after = swarm.until("c", lambda s: s.exchanges_done > before)
    assert after.trainer_restarts == 0
    assert after.state == "training"
