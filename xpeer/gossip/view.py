"""Protocols of the trainer and the node, as far as gossip needs them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

from xpeer.identity import PeerId
from xpeer.round import Trainer


class GossipTrainer(Trainer, Protocol):
    """The trainer as gossip sees it: what a meeting needs, and its counters."""

    @property
    def epoch(self) -> int:
        """A random number that is drawn at each start of a trainer."""

    @property
    def resumed_step(self) -> int | None:
        """Step of the checkpoint that it resumed from; None = it resumed from none."""

    @property
    def step(self) -> int:
        """Local steps done."""

    @property
    def window(self) -> int:
        """Windows of local steps done."""

    @property
    def ledger_counter(self) -> int:
        """Number of privacy charges in its ledger."""

    def fragment_values(self, fragment: int, *, averaging: bool) -> int:
        """Number of values that an exchange of this fragment sends."""


class NodeView(Protocol):
    """The node as gossip sees it."""

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
        """Whether a member may exchange, by its card; True if we have no card of it."""

    def zones(self) -> Mapping[PeerId, str]:
        """Zones that live members declare, ourselves included. Links within a zone are fast."""

    def has_nothing_due(self, peer_id: PeerId) -> bool:
        """Whether the partner and we have both ended, so that no exchange is due between us."""

    def declared_rate(self, peer_id: PeerId) -> float:
        """Published tokens per second of a member, ourselves included, relative to the median."""

    def quality(self) -> tuple[float | None, float]:
        """Our model's loss on the public text, and its age in windows."""
