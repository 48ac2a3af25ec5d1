"""What gossip asks of the node around it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

from xpeer.identity import PeerId
from xpeer.round import Trainer


class GossipTrainer(Trainer, Protocol):
    """What gossip asks of the trainer beside exchanges."""

    @property
    def epoch(self) -> int:
        """Drawn at its start."""

    @property
    def resumed_step(self) -> int | None:
        """Of the checkpoint that it went on from; None = it began anew."""

    @property
    def step(self) -> int:
        """Local steps done."""

    @property
    def window(self) -> int:
        """Windows of local steps done."""

    @property
    def ledger_counter(self) -> int:
        """Privacy charges so far."""

    def fragment_values(self, fragment: int, *, averaging: bool) -> int:
        """Values that a fragment's exchange sends."""


class NodeView(Protocol):
    """The node around gossip."""

    @property
    def trainer(self) -> GossipTrainer | None:
        """The running trainer, if it holds the swarm's parameters."""

    def idle_reason(self) -> str | None:
        """Why this node exchanges nothing now (paused, not ready), or None."""

    def training(self) -> bool:
        """Whether local steps are being taken: then exchanges are paced by them."""

    def partners(self) -> Collection[PeerId]:
        """Live members that exchange, without ourselves."""

    def may_exchange(self, peer_id: PeerId) -> bool:
        """Whether what we know of a member allows that it exchanges: nothing known allows it."""

    def zones(self) -> Mapping[PeerId, str]:
        """What live members declare, ourselves included: those of a zone have fast links."""

    def has_nothing_due(self, peer_id: PeerId) -> bool:
        """Whether the partner and we both ended, so that no exchange is due between us."""

    def declared_rate(self, peer_id: PeerId) -> float:
        """Published tokens per second of a member, ourselves included, relative to the median."""

    def quality(self) -> tuple[float | None, float]:
        """Our model's loss on the public text, and its age in windows."""
