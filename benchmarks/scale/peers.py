"""A real peer without a model: network, roster, gossip and exchange as in the daemon.

`benchmarks.vector` stands for the trainer.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.vector import Vector
from xpeer.errors import PeerError
from xpeer.gossip.clock import Gossip
from xpeer.gossip.partners import Partners
from xpeer.gossip.record import Record
from xpeer.identity import Identity, PeerId, blake2b
from xpeer.manifest import Manifest, PublicText
from xpeer.manifest.model import Model
from xpeer.manifest.privacy import Privacy
from xpeer.manifest.round import Round
from xpeer.manifest.signed import Genesis
from xpeer.network import agreement, nudging
from xpeer.network.agreement import Agreement
from xpeer.network.membership.certificates import Credential, Membership
from xpeer.network.membership.invites import grant
from xpeer.network.membership.keyring import KeyRing
from xpeer.network.swarm import Swarm
from xpeer.roster.roster import ANNOUNCE_EVERY_S, MemberRecord, Roster
from xpeer.round import Exchanged

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
KEY = b"k" * 32
NUM_PARAMS, FRAGMENTS = 16_384, 4
DEADLINE_S = 10.0
ROSTER_EVERY_S = 3.0
"""As the daemon does."""


def manifest(slot_s: float) -> Manifest:
    """What the peers share."""
    return Manifest(
        name="scale",
        created_unix_s=1,
        model=Model({"model_type": "none"}, NUM_PARAMS, "00"),
        public_text=PublicText(blake2b(b"public").hex(), "public"),
        privacy=Privacy(mode="off"),
        round=Round(slot_s=slot_s, fragments=FRAGMENTS, codec="int8", deadline_s=DEADLINE_S),
    )


class Book(Partners):
    """Remembers what became of every exchange by its id.

    Attributes:
        begun: exchanges that both sides agreed to.
        merged: those that both accepted.
        dropped: those that were given up, with a reason.
    """

    def __init__(self) -> None:
        super().__init__(time.time)
        self.begun: set[int] = set()
        self.merged: set[int] = set()
        self.dropped: set[int] = set()

    def began(self, agreement: Agreement) -> Record:
        """Note it."""
        self.begun.add(agreement.exchange_id)
        return super().began(agreement)

    def done(self, agreement: Agreement, result: Exchanged, took_s: float) -> None:
        """Note it."""
        self.merged.add(agreement.exchange_id)
        super().done(agreement, result, took_s)

    def failed(
        self,
        peer_id: PeerId,
        slot: int,
        error: PeerError,
        agreement: Agreement | None = None,
        lost_s: float = 0.0,
    ) -> None:
        """Note it."""
        if agreement is not None:
            self.dropped.add(agreement.exchange_id)
        super().failed(peer_id, slot, error, agreement, lost_s)


class RigPeer:
    """One peer of the rig; also the host of its gossip. Start with `start`, end with `close`."""

    def __init__(self, number: int, folder: Path, admin: Identity, slot_s: float) -> None:
        self.number = number
        self.identity = Identity.generate()
        self.peer_id = self.identity.peer_id
        self.exchanging = False
        generator = torch.Generator().manual_seed(number)
        self.trainer = Vector(torch.randn(NUM_PARAMS, generator=generator), FRAGMENTS, "int8")
        self.book = Book()
        self.closed = False
        self._path = folder / f"key-{number}-{self.peer_id}"
        self._admin = admin
        self._manifest = manifest(slot_s)
        self._tasks: list[asyncio.Task[None]] = []
        self.swarm: Swarm
        self.roster: Roster
        self.gossip: Gossip

    async def start(self, seeds: list[str]) -> None:
        """Join: sidecar, DHT node, roster, gossip."""
        genesis = Genesis(self._admin.verify_key, b"h" * 32)
        certificate = grant(genesis, self.peer_id, "member", 86_400, time.time())
        credential = Credential.issue(self._admin, certificate, self.peer_id)
        membership = Membership(genesis.swarm_id, credential)
        self.identity.save(self._path)
        self.swarm = await Swarm.start(
            self.identity, self._path, membership, listen=[LOOPBACK], seeds=seeds
        )
        keyring = KeyRing(KEY)
        party = agreement.Party(
            self.identity, genesis.swarm_id, keyring, b"m" * 32, certificate.serial, membership
        )
        self.roster = Roster(self.swarm, keyring, self._manifest.limits.max_members)
        await self.roster.serve()
        self._proposer = agreement.Proposer(party, self.swarm)
        self.gossip = Gossip(
            me=self.peer_id,
            swarm_id=genesis.swarm_id,
            manifest=self._manifest,
            host=self,
            proposer=self._proposer,
            nudge=lambda peer_id: nudging.ask(self.swarm, peer_id),
            clock=time.time,
            partners=self.book,
        )
        await self.swarm.serve_links(
            agreement.PROTOCOL, agreement.answering(party, self.gossip), "member"
        )
        loops = (self._announcing(), self._refreshing(), self.gossip.run())
        self._tasks = [asyncio.create_task(loop) for loop in loops]

    async def close(self) -> None:
        """Go without a word."""
        self.closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.swarm.close()

    def counts(self) -> dict[str, Any]:
        """What became of its exchanges."""
        return {
            "begun": sorted(self.book.begun),
            "merged": sorted(self.book.merged),
            "dropped": sorted(self.book.dropped),
            "skipped": dict(self.book.failures + self.book.skips),
            "told_one_sided": self.book.one_sided,
        }

    @property
    def sidecar_pid(self) -> int:
        """Of the libp2p process."""
        return int(self.swarm._p2p._child.pid)

    def view(self) -> str:
        """Which members it lists, as one short word."""
        return blake2b("".join(sorted(self.roster.members())).encode(), size=4).hex()

    async def _announcing(self) -> None:
        while True:
            record = MemberRecord(
                self.peer_id, self.swarm.addresses[:8], "member", "training", 1.0, 0
            )
            await self.roster.announce(record)
            await asyncio.sleep(ANNOUNCE_EVERY_S)

    async def _refreshing(self) -> None:
        while True:
            await self.roster.refresh()
            await asyncio.sleep(ROSTER_EVERY_S)

    # Host of gossip

    def idle_reason(self) -> str | None:
        """Exchange, or not."""
        return None if self.exchanging else "paused"

    def training(self) -> bool:
        """Every slot is due."""
        return False

    def partners(self) -> list[PeerId]:
        """Everybody who is listed."""
        return [peer for peer in self.roster.members() if peer != self.peer_id]

    def may_exchange(self, peer_id: PeerId) -> bool:
        """Everybody does."""
        return True

    def has_nothing_due(self, peer_id: PeerId) -> bool:
        """Nobody ends."""
        return False

    def zones(self) -> dict[PeerId, str]:
        """As declared."""
        return self.roster.zones()

    def declared_rate(self, peer_id: PeerId) -> float:
        """All alike."""
        return 1.0

    def quality(self) -> tuple[float | None, float]:
        """Nothing is measured."""
        return None, 0.0


async def stop_all(peers: list[RigPeer]) -> None:
    """Close those that still run."""
    with contextlib.suppress(Exception):
        await asyncio.gather(*(peer.close() for peer in peers if not peer.closed))
