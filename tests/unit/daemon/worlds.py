"""A node as its partners, its members and its operator see it."""

from __future__ import annotations

from typing import Any, cast

import msgspec

from tests.unit.daemon.fakes import FakeNode
from xpeer.config import NodeConfig, Training
from xpeer.gossip.clock import Gossip
from xpeer.identity import PeerId
from xpeer.manifest import Manifest
from xpeer.roster.cards import MemberRecord
from xpeer.status import PrivacySpent, Progress
from xpeer.trainer.client import TrainerProcess, _Started
from xpeer.wire.messages import Propose
from xpeer_daemon.presence import Presence

ME, OTHER, THIRD = (PeerId(f"12D3KooW{letter}") for letter in "ABC")
NOW_S = 1_000.5


def saying(progress: Progress, privacy: PrivacySpent) -> TrainerProcess:
    """A trainer that said so last."""
    trainer = TrainerProcess(lambda event: None)
    trainer.epoch, trainer.ledger_counter = 5, 3
    trainer.facts = msgspec.structs.replace(trainer.facts, num_params=1000, num_fragments=3)
    nothing: Any = None
    trainer._started = _Started(nothing, nothing, 1, nothing)
    trainer.progress, trainer.privacy = progress, privacy
    return trainer


class World:
    """A node of ours with a trainer; all around are fakes.

    Args:
        manifest: of the swarm.
        trainer: a real one, or `saying` what a test wants.
        others: PeerIDs of two members, of which the first is the partner.
    """

    def __init__(
        self,
        manifest: Manifest,
        trainer: TrainerProcess,
        others: tuple[PeerId, PeerId] = (OTHER, THIRD),
    ) -> None:
        self.others = others
        config = NodeConfig(training=Training(speed=0.0))
        self.fake = fake = FakeNode(config=config, clock=lambda: NOW_S, manifest=manifest)
        fake.supervisor.trainer, fake.record.known = trainer, None
        fake.members = self.members()
        self.node, self.view = fake.node, fake.view
        self.said: list[MemberRecord] = []
        self.unstored = False
        self.partners = fake.partners
        self.gossip = Gossip(
            me=ME,
            swarm_id="ab" * 32,
            manifest=manifest,
            host=fake.view,
            proposer=cast(Any, None),
            nudge=cast(Any, None),
            clock=lambda: NOW_S,
            partners=self.partners,
        )

    def members(self) -> dict[PeerId, MemberRecord]:
        speeds = dict(zip((ME, *self.others), (0.0, 100.0, 300.0), strict=True))
        return {
            peer: MemberRecord(peer, [], "member", "training", speed, 1)
            for peer, speed in speeds.items()
        }

    async def announce(self, record: MemberRecord) -> None:
        self.said.append(record)

    async def shown(self) -> dict[str, Any]:
        """Everything that others get of this node, but for updates."""
        self.fake.swarm.addresses = ["/ip4/192.0.2.1/tcp/1"]
        roster, nothing = cast(Any, self), cast(Any, None)
        presence = Presence(self.node, self.view, roster, nothing, nothing, 1.0)
        await presence.announce(self.node.phase)
        record = msgspec.structs.replace(self.said[-1], slot=0)  # of the real clock
        terms = self.gossip.terms(self.others[0], 1000)
        refusal = self.gossip.refusal_of(
            self.others[0], Propose(1, 1000, 0, "int8", 5, False, terms)
        )
        return {"record": record, "terms": terms, "refusal": refusal}
