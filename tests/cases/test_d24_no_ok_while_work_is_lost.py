"""D24: a node never says that it is well while work is lost.

2 of 3 partners gone, a disk that is full, a clock that is wrong, no seed, a partner that never
ends: all said `ok`. Each condition's own tests are in tests/unit/daemon/test_conditions.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from xpeer.config import NodeConfig
from xpeer.identity import PeerId
from xpeer.network.roster import MemberRecord
from xpeer.status import Progress, Status
from xpeer.training.handle import TrainerProcess
from xpeer_daemon.node import Node

OTHERS = ("12D3KooWAlphaAAA", "12D3KooWBetaBBBB", "12D3KooWGammaCCC")


class Rig:
    """A training node with three partners, and a clock that the test turns."""

    def __init__(self) -> None:
        self.now = 1e9
        self.node = Node(PeerId("12D3KooWMe"), NodeConfig(), lambda: self.now)
        self.members = {p: MemberRecord(p, [], "member", "training", 0.0, 0) for p in OTHERS}
        self.seen: Any = SimpleNamespace(silent_seeds="", clock_ahead_s=0.0, clocks=3)
        roster: Any = SimpleNamespace(members=lambda: self.members)
        swarm: Any = SimpleNamespace(
            sidecar_alive=True, addresses=[], sidecar_restarts=0, strangers_refused=0,
            meter=SimpleNamespace(bytes_in=0, bytes_out=0), bootstrap_note="",
            bootstrapping=self.seen,
        )  # fmt: skip
        trainer = TrainerProcess(lambda event: None)
        trainer.progress = Progress(step=5, tokens=1)
        supervisor: Any = SimpleNamespace(trainer=trainer, restarts=0, down_reason="")
        self.node.roster, self.node.swarm, self.node.supervisor = roster, swarm, supervisor
        self.node.enter("training")
        self.works("training")

    def works(self, state: str) -> None:
        self.node.last_exchange_s = self.now
        self.node.follow_trainer(state, Progress(step=5, tokens=1))

    def status(self, state: str = "training") -> Status:
        """As it is five seconds later, with an exchange in between."""
        self.now += 5
        self.works(state)
        return self.node.status()


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
    rig.node.swarm.bootstrap_note = "this node's clock is 120 s behind"  # type: ignore[union-attr,misc]
    rig.seen.clock_ahead_s = -120.0
    told = rig.status()
    assert told.health == "degraded", f"the clock is 120 s off: {told.health}"
    assert "120 s behind" in str(told.reasons)


def test_no_seed_answers_while_training(rig: Rig) -> None:
    rig.node.swarm.bootstrap_note = "no seed answers: timeout"  # type: ignore[union-attr,misc]
    rig.seen.silent_seeds = "timeout"
    told = rig.status()
    assert told.health == "degraded", f"no seed answers: {told.health}"
    assert "no seed answers" in str(told.reasons)


def test_no_checkpoint(rig: Rig) -> None:
    rig.now += 2 * 3600.0  # one is due every 600 s; the disk is full
    rig.node.last_checkpoint_s = None
    told = rig.status()
    assert told.health == "degraded", f"no checkpoint for two hours: {told.health}"
    assert "no checkpoint" in str(told.reasons)
