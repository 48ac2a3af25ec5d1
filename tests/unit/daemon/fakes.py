"""A node whose parts are fakes, on a clock that tests turn."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from xpeer.config import Home, NodeConfig
from xpeer.gossip.partners import Partners
from xpeer.health import Health
from xpeer.identity import PeerId
from xpeer.manifest.privacy import Privacy
from xpeer.manifest.round import Round
from xpeer.phase import Phase
from xpeer.roster.cards import MemberRecord
from xpeer.status import Progress
from xpeer.trainer.client import TrainerProcess
from xpeer_daemon.acquaintances import Acquaintances
from xpeer_daemon.ending import Ends
from xpeer_daemon.life import Life
from xpeer_daemon.missed import Missed
from xpeer_daemon.node import Node
from xpeer_daemon.swarm_view import SwarmView
from xpeer_daemon.throughput import Throughput
from xpeer_daemon.training_record import TrainingRecord

ME = PeerId("12D3KooWMe")
ALPHA, BETA, GAMMA = "12D3KooWAlphaAAA", "12D3KooWBetaBBBB", "12D3KooWGammaCCC"
MANIFEST = SimpleNamespace(
    name="swarm",
    round=Round(slot_s=1.0, window_steps=2, fragments=1),
    privacy=Privacy(),
    model=SimpleNamespace(num_params=0),
)
CERTIFICATE = SimpleNamespace(
    genesis=SimpleNamespace(swarm_id="swarm"), role="member", serial=1,
    not_before_unix_s=0, not_after_unix_s=1 << 40,
)  # fmt: skip


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def member(peer: str, phase: str = "training", role: Any = "member") -> MemberRecord:
    return MemberRecord(peer, [], role, phase, 0.0, 0)


class FakeNode:
    """`node` trains with the members in `members`; all that it sees can be changed.

    Args:
        members: their PeerIDs.
        config: settings.
        clock: a `Clock`, or any other.
        manifest: or what of it is asked.
        throughput: of a node without privacy.
        admitted: False: it is still a candidate, and starting.
    """

    def __init__(
        self,
        *members: str,
        config: NodeConfig | None = None,
        clock: Any = None,
        manifest: Any = MANIFEST,
        throughput: Throughput | None = None,
        admitted: bool = True,
    ) -> None:
        self.clock = clock or Clock()
        config = config or NodeConfig()
        self.members = {PeerId(peer): member(peer) for peer in members}
        self.bootstrapping = SimpleNamespace(
            silent_seeds="", clock_ahead_s=0.0, clocks=2, unheard=0
        )
        self.swarm = SimpleNamespace(
            bootstrapping=self.bootstrapping, sidecar_alive=True, addresses=[],
            sidecar_restarts=0, strangers_refused=0, direct=SimpleNamespace(strangers=0),
            meter=SimpleNamespace(bytes_in=10, bytes_out=20),
        )  # fmt: skip
        self.life = Life(self.clock)
        self.record = TrainingRecord(Health(self.clock), self.clock)
        self.node = Node(
            ME,
            cast(Any, CERTIFICATE),
            config,
            self.life,
            self.record,
            cast(Any, self.swarm),
            Ends(Home(Path("/nowhere")), config),
            self.clock,
        )
        self.trainer: Any = TrainerProcess(lambda event: None)
        supervisor: Any = SimpleNamespace(trainer=self.trainer, restarts=0, down_reason="")
        self.supervisor = supervisor
        self.view = SwarmView(
            ME,
            config,
            self.life,
            self.supervisor,
            lambda: self.members,
            Missed(),
            Acquaintances(self.clock),
            throughput,
        )
        self.partners = Partners(self.clock)
        self.turns = SimpleNamespace(joiners=0)
        self.step = 0
        if not admitted:
            return
        self.node.member = cast(
            Any,
            SimpleNamespace(
                view=self.view, supervisor=self.supervisor, partners=self.partners,
                manifest=manifest, turns=self.turns,
            ),
        )  # fmt: skip
        self.is_in("training")
        self.works()

    def is_in(self, phase: str) -> None:
        """Whatever came before."""
        self.life.phase = Phase(phase)
        self.life.since_s = self.clock()

    def works(self, steps: int = 1, state: Any = "training") -> None:
        """A step and an exchange went well."""
        self.step += steps
        progress = Progress(
            step=self.step, planned_steps=1000, tokens=1,
            loss_measured_step=self.step, loss_measured_age_s=0.0,
        )  # fmt: skip
        self.node.follow_trainer(state, progress)
        self.partners.last_done_s = self.clock()

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
