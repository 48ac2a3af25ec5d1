"""The swarm as this node sees it, and this node as gossip sees it (`NodeView`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from xpeer.config import NodeConfig
from xpeer.errors import Reason
from xpeer.identity import PeerId
from xpeer.phase import Phase, Traits, traits_of
from xpeer.roster.cards import MemberRecord
from xpeer.training import partition
from xpeer_daemon.acquaintances import Acquaintances
from xpeer_daemon.life import Life
from xpeer_daemon.missed import Missed
from xpeer_daemon.supervisor import Supervisor
from xpeer_daemon.throughput import Throughput

if TYPE_CHECKING:
    from xpeer.trainer.client import TrainerProcess


class SwarmView:
    """Who is there, who exchanges, and whether we do.

    Args:
        me: our PeerID.
        config: has our zone and declared speed.
        life: our phase.
        supervisor: of our trainer.
        listed: returns the roster's cards by PeerID, perhaps with our own.
        missed: members that fell silent.
        acquaintances: the members' names and steps.
        throughput: measures our speed. None under privacy: the time of a batch follows from its
            private size, so it is not measured.
    """

    def __init__(
        self,
        me: PeerId,
        config: NodeConfig,
        life: Life,
        supervisor: Supervisor,
        listed: Callable[[], Mapping[PeerId, MemberRecord]],
        missed: Missed,
        acquaintances: Acquaintances,
        throughput: Throughput | None = None,
    ) -> None:
        self.missed = missed
        self.acquaintances = acquaintances
        self.throughput = throughput
        self._me = me
        self._config = config
        self._life = life
        self._supervisor = supervisor
        self._listed = listed

    # The others

    def others(self) -> dict[PeerId, MemberRecord]:
        """Live members and observers, without ourselves and without those who left."""
        return {p: r for p, r in self.others_listed().items() if r.phase != "left"}

    def others_listed(self) -> dict[PeerId, MemberRecord]:
        """The same as `others`, and those who left."""
        return {p: r for p, r in self._listed().items() if p != self._me}

    def name_of(self, peer: PeerId) -> str:
        """Name of a member for people."""
        return self.acquaintances.name_of(peer)

    def members(self, of_kind: Callable[[Traits], bool]) -> dict[PeerId, MemberRecord]:
        """Live members, without ourselves and observers, whose phase has these traits."""
        return {
            peer: record
            for peer, record in self.others().items()
            if record.role != "observer" and of_kind(traits_of(record.phase))
        }

    def partners(self) -> list[PeerId]:
        """Live members that exchange."""
        return list(self.members(lambda traits: traits.exchanges))

    def may_exchange(self, peer_id: PeerId) -> bool:
        """Whether a member may exchange, by its card; True if we have no card of it."""
        record = self.others_listed().get(peer_id)
        return record is None or (record.role != "observer" and traits_of(record.phase).exchanges)

    def present(self) -> list[PeerId]:
        """Live members that train or are about to, without ourselves."""
        return list(self.members(lambda traits: traits.counts_as_present))

    def holders(self) -> list[PeerId]:
        """Live members that hold the swarm's parameters. An observer never counts as one."""
        return list(self.members(lambda traits: traits.holds_parameters))

    def active_phases(self) -> list[str]:
        """Phases of the other members that train, are about to, or have ended."""
        return [r.phase for r in self.members(lambda traits: traits.takes_part).values()]

    def still_training(self) -> list[PeerId]:
        """Live members that may take more steps."""
        return list(self.members(lambda traits: traits.delays_the_end))

    def zones(self) -> dict[PeerId, str]:
        """Zones that the live members declare, ourselves included."""
        zones = {peer: record.zone for peer, record in self.others().items()}
        return {**zones, self._me: self._config.network.zone}

    def has_nothing_due(self, peer_id: PeerId) -> bool:
        """Whether no exchange is due with this partner.

        None is due if both of us have ended and others still train, or if both have finished. In
        between, both close.
        """
        record = self.others().get(peer_id)
        if record is None or not self.has_ended():
            return False
        if not traits_of(record.phase).ended:
            return False
        if self.still_training():
            return True
        return self._life.phase == record.phase == Phase.FINISHED

    # Speeds

    @property
    def speed(self) -> float:
        """Our published speed, tokens/s: declared, else measured; 0 = unknown."""
        declared = self._config.training.speed
        if declared or self.throughput is None:
            return declared
        return self.throughput.published

    def speeds(self) -> dict[str, float]:
        """Published speeds of all that train or are about to, ourselves included."""
        others, present = self.others(), self.present()
        return {**{peer: others[peer].speed for peer in present}, self._me: self.speed}

    def declared_rate(self, peer_id: PeerId) -> float:
        """Published speed of a member relative to the median one; 1 for a member that has none."""
        return partition.weights(self.speeds()).get(peer_id, 1.0)

    # Ourselves

    @property
    def trainer(self) -> TrainerProcess | None:
        """The running trainer, if our phase exchanges: then it holds the swarm's parameters."""
        return self._supervisor.trainer if self._life.phase.traits.exchanges else None

    def donor(self) -> TrainerProcess | None:
        """The running trainer, if it holds parameters that we may give to joiners."""
        return self._supervisor.trainer if self._life.phase.traits.holds_parameters else None

    def idle_reason(self) -> str | None:
        """Why this node exchanges nothing now, a reason code; None if it does."""
        if self._life.phase is Phase.PAUSED:
            return Reason.PAUSED
        ready = self.trainer is not None and not self._life.catching_up
        return None if ready else Reason.NOT_READY

    def training(self) -> bool:
        """Whether local steps are being taken."""
        return self._life.phase is Phase.TRAINING

    def has_ended(self) -> bool:
        """Whether we take no further steps in this run."""
        return self._life.phase.traits.ended

    def quality(self) -> tuple[float | None, float]:
        """Our public loss and its age in windows. Losses on the shard are private data."""
        trainer = self._supervisor.trainer
        if trainer is None:
            return None, 0.0
        return trainer.progress.loss_public, trainer.progress.loss_public_age
