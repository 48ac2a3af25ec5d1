"""A node whose parts are fakes, on a clock that tests turn."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from xpeer.config import NodeConfig
from xpeer.identity import PeerId
from xpeer.network.cards import MemberRecord
from xpeer.status import Progress
from xpeer.training.handle import TrainerProcess
from xpeer_daemon.node import Node
from xpeer_daemon.partners import Partners

ME = PeerId("12D3KooWMe")
ALPHA, BETA, GAMMA = "12D3KooWAlphaAAA", "12D3KooWBetaBBBB", "12D3KooWGammaCCC"


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def member(peer: str, phase: str = "training", role: Any = "member") -> MemberRecord:
    return MemberRecord(peer, [], role, phase, 0.0, 0)


class FakeNode:
    """`node` trains with the members in `members`; all that it sees can be changed."""

    def __init__(self, *members: str, config: NodeConfig | None = None) -> None:
        self.clock = Clock()
        self.node = Node(ME, config or NodeConfig(), self.clock)
        self.members = {PeerId(peer): member(peer) for peer in members}
        self.node.roster = cast(Any, SimpleNamespace(members=lambda: self.members))
        self.bootstrapping = SimpleNamespace(silent_seeds="", clock_ahead_s=0.0, clocks=2)
        self.swarm = SimpleNamespace(
            bootstrapping=self.bootstrapping, sidecar_alive=True, addresses=[],
            sidecar_restarts=0, strangers_refused=0,
            meter=SimpleNamespace(bytes_in=10, bytes_out=20),
        )  # fmt: skip
        self.node.swarm = cast(Any, self.swarm)
        self.trainer = TrainerProcess(lambda event: None)
        self.supervisor = SimpleNamespace(trainer=self.trainer, restarts=0, down_reason="")
        self.node.supervisor = cast(Any, self.supervisor)
        self.book = Partners(self.clock, lambda *_: None, lambda *_: None)
        self.node.book = self.book
        self.step = 0
        self.node.enter("training")
        self.works()

    def works(self, steps: int = 1, state: str = "training") -> None:
        """A step and an exchange went well."""
        self.step += steps
        progress = Progress(
            step=self.step, planned_steps=1000, tokens=1,
            loss_measured_step=self.step, loss_measured_age_s=0.0,
        )  # fmt: skip
        self.node.follow_trainer(state, progress)
        self.node.last_exchange_s = self.clock()

    def passes(self, seconds: float, *, working: bool = True) -> None:
        """Time, with a look at the node's health every second or so, as the daemon takes it."""
        for _ in range(max(1, int(seconds))):
            self.clock.now += seconds / max(1, int(seconds))
            if working:
                self.works()
            self.node.reasons()

    @property
    def codes(self) -> list[str]:
        return [reason.code for reason in self.node.reasons()]

    def text(self, code: str) -> str:
        (found,) = [reason.text for reason in self.node.reasons() if reason.code == code]
        return found
