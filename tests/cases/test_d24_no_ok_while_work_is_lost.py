"""D24: a node never says that it is well while work is lost.

2 of 3 partners gone, a disk that is full, a clock that is wrong, no seed, a partner that never
ends: all said `ok`. Each condition's own tests are in tests/unit/daemon/test_conditions.py.
"""

from __future__ import annotations

import pytest

from tests.unit.daemon.fakes import ALPHA, BETA, GAMMA, FakeNode
from xpeer.identity import PeerId
from xpeer.phase import TrainerPhase
from xpeer.roster.roster import MemberRecord
from xpeer.status import Progress, Status

OTHERS = (PeerId(ALPHA), PeerId(BETA), PeerId(GAMMA))


class Rig:
    """A training node with three partners, and a clock that the test turns."""

    def __init__(self) -> None:
        self.fake = FakeNode(*OTHERS)
        self.members, self.seen = self.fake.members, self.fake.bootstrapping
        self.fake.trainer.progress = Progress(step=5, tokens=1)
        self.works("training")

    def works(self, state: TrainerPhase) -> None:
        self.fake.partners.last_done_s = self.fake.clock()
        self.fake.node.follow_trainer(state, Progress(step=5, tokens=1))

    def status(self, state: TrainerPhase = "training") -> Status:
        """As it is five seconds later, with an exchange in between."""
        self.fake.clock.now += 5
        self.works(state)
        return self.fake.node.status()


@pytest.fixture
def rig() -> Rig:
    found = Rig()
    assert found.status().health == "ok"
    return found


def test_two_of_three_partners_are_gone(rig: Rig) -> None:
    for gone in OTHERS[1:]:
        del rig.members[gone]
    told = rig.status()
    assert told.health == "degraded", f"2 of 3 partners gone: {told.health}"
    assert "2 of 3" in str(told.reasons)


def test_a_partner_that_never_ends(rig: Rig) -> None:
    rig.members[OTHERS[0]] = MemberRecord(OTHERS[0], [], "member", "closing", 0.0, 0)
    told = rig.status("closing")
    assert told.health == "degraded", f"two others still train: {told.health}"
    assert OTHERS[1][-8:] in str(told.reasons)


def test_a_wrong_clock(rig: Rig) -> None:
    rig.seen.clock_ahead_s = -120.0
    told = rig.status()
    assert told.health == "degraded", f"the clock is 120 s off: {told.health}"
    assert "120 s behind" in str(told.reasons)


def test_no_seed_answers_while_training(rig: Rig) -> None:
    rig.seen.silent_seeds = "timeout"
    told = rig.status()
    assert told.health == "degraded", f"no seed answers: {told.health}"
    assert "no seed answers" in str(told.reasons)


def test_no_checkpoint(rig: Rig) -> None:
    rig.fake.clock.now += 2 * 3600.0  # one is due every 600 s; the disk is full
    rig.fake.record.saved_s = None
    told = rig.status()
    assert told.health == "degraded", f"no checkpoint for two hours: {told.health}"
    assert "no checkpoint" in str(told.reasons)
