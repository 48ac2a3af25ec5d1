"""A real peer without a model: network, roster, gossip and exchange as in the daemon.

A stand-in for the trainer mixes a small vector with the real codec and mixing.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from xpeer.identity import Identity, PeerId, blake2b
from xpeer.manifest import Genesis, Manifest, Model, Privacy, PublicText, Round
from xpeer.network import exchange
from xpeer.network.invites import grant
from xpeer.network.membership import Credential, Membership
from xpeer.network.roster import ANNOUNCE_EVERY_S, MemberRecord, Roster
from xpeer.network.swarm import Swarm
from xpeer.round import Exchanged
from xpeer.training.mixing import Fragments, NormLimit, correction
from xpeer.update import CompressedUpdate, PeerUpdate, received_stamp
from xpeer.wire import codec
from xpeer_daemon.gossip import Gossip

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
KEY = b"k" * 32
NUM_PARAMS = 16_384
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
        round=Round(slot_s=slot_s, fragments=4, codec="int8", deadline_s=10.0),
    )


class Vector:
    """Stands for the trainer: a vector instead of a model, and no steps.

    Attributes:
        begun: exchange ids whose snapshot was taken.
        merged: exchange ids that were merged.
        dropped: exchange ids that were given up.
    """

    step = 0
    ledger_counter = 0

    def __init__(self, seed: int) -> None:
        self.epoch = 1 + seed
        self.theta = torch.randn(NUM_PARAMS, generator=torch.Generator().manual_seed(seed))
        self.begun: set[int] = set()
        self.merged: set[int] = set()
        self.dropped: set[int] = set()
        self._fragments = Fragments(NUM_PARAMS, 4, "5a" * 32)
        self._limit = NormLimit()
        self._own: dict[int, tuple[int, torch.Tensor]] = {}
        self._z: dict[int, torch.Tensor] = {}

    def fragment_params(self, fragment: int) -> int:
        """Values in a fragment."""
        return len(self._fragments.indices(fragment))

    async def snapshot(self, exchange_id: int, fragment: int) -> CompressedUpdate:
        """Quantise a fragment."""
        self.begun.add(exchange_id)
        values = self.theta.index_select(0, self._fragments.indices(fragment))
        payload = codec.encode("int8", values)
        self._own[exchange_id] = fragment, codec.decode("int8", payload, len(values))
        return CompressedUpdate(payload, "int8", len(values), 0, received_stamp("off", 0))

    async def verify(self, exchange_id: int, update: PeerUpdate) -> float:
        """Decode the partner's, and compare."""
        _, own = self._own[exchange_id]
        found = correction(own, codec.decode("int8", update.payload, len(own)), self._limit)
        self._limit.accepted(found.norm)
        self._z[exchange_id] = found.values
        return found.distance

    async def merge(self, exchange_id: int, weight: float) -> None:
        """Add the difference."""
        fragment, _ = self._own.pop(exchange_id)
        indices = self._fragments.indices(fragment).long()
        self.theta.index_add_(0, indices, self._z.pop(exchange_id), alpha=weight)
        self.merged.add(exchange_id)

    def drop(self, exchange_id: int) -> None:
        """Give up."""
        self.dropped.add(exchange_id)
        self._own.pop(exchange_id, None)
        self._z.pop(exchange_id, None)


class RigPeer:
    """One peer of the rig; also the host of its gossip. Start with `start`, end with `close`."""

    def __init__(self, number: int, folder: Path, admin: Identity, slot_s: float) -> None:
        self.number = number
        self.identity = Identity.generate()
        self.peer_id = self.identity.peer_id
        self.exchanging = False
        self.trainer = Vector(number)
        self.skipped: Counter[str] = Counter()
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
        party = exchange.Party(
            self.identity, genesis.swarm_id, KEY, b"m" * 32, certificate.serial, membership
        )
        self.roster = Roster(self.swarm, KEY, self._manifest.limits.max_members)
        await self.roster.serve()
        self._proposer = exchange.Proposer(party, self.swarm)
        self.gossip = Gossip(
            me=self.peer_id,
            swarm_id=genesis.swarm_id,
            manifest=self._manifest,
            host=self,
            proposer=self._proposer,
            num_bytes=codec.encoded_bytes,
            clock=time.time,
            on_exchanged=self._on_exchanged,
            on_skipped=self._on_skipped,
        )
        await self.swarm.serve_links(
            exchange.PROTOCOL,
            exchange.answering(party, self.gossip, codec.encoded_bytes),
            "member",
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
            "begun": sorted(self.trainer.begun),
            "merged": sorted(self.trainer.merged),
            "dropped": sorted(self.trainer.dropped),
            "skipped": dict(self.skipped),
            "told_one_sided": self.gossip.one_sided,
            "exchanges": self.gossip.exchanges,
            "payload_bytes": self.gossip.payload_bytes_sent,
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

    def objection(self) -> str | None:
        """Exchange, or not."""
        return None if self.exchanging else "paused"

    def training(self) -> bool:
        """Every slot is due."""
        return False

    def partners(self) -> list[PeerId]:
        """Everybody who is listed."""
        return [peer for peer in self.roster.members() if peer != self.peer_id]

    def settled(self, peer_id: PeerId) -> bool:
        """Nobody ends."""
        return False

    def declared_rate(self) -> float:
        """All alike."""
        return 1.0

    def _on_exchanged(self, peer_id: PeerId, slot: int, fragment: int, result: Exchanged) -> None:
        """Counted by the trainer, with its exchange id."""

    def _on_skipped(self, peer_id: str, slot: int, reason: str, detail: str) -> None:
        self.skipped[reason] += 1


async def stop_all(peers: list[RigPeer]) -> None:
    """Close those that still run."""
    with contextlib.suppress(Exception):
        await asyncio.gather(*(peer.close() for peer in peers if not peer.closed))
