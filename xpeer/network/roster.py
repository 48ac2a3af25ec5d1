"""Who is alive: every member's own record in the DHT, signed, encrypted, and expiring.

A record lies under a keyed hash of the swarm key and is padded, so a node without the key sees who
stores (the owner's PeerID and signature) and when, and nothing else. The roster is spread over
several keys: the DHT returns a key's dictionary whole.
"""

from __future__ import annotations

import logging
from typing import Annotated

import msgspec
from hivemind.utils import get_dht_time
from msgspec import Meta, Struct
from nacl.exceptions import CryptoError
from nacl.secret import SecretBox

from xpeer.identity import PeerId, blake2b
from xpeer.network.membership import Role
from xpeer.network.swarm import Swarm

log = logging.getLogger("xpeer.network")

TTL_S = 40.0
ANNOUNCE_EVERY_S = 10.0
MEMBERS_PER_SHARD = 64
PAD_BYTES = 256
MAX_RECORD_BYTES = 2048


class MemberRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """What a member says of itself. Nothing in it depends on its text."""

    peer_id: Annotated[str, Meta(max_length=80)]
    addresses: Annotated[list[Annotated[str, Meta(max_length=300)]], Meta(max_length=8)]
    role: Role
    phase: Annotated[str, Meta(max_length=20)]
    speed: Annotated[float, Meta(gt=0, le=1e6)]
    """Declared, not measured: measured counts are data."""
    slot: Annotated[int, Meta(ge=0)]


class Roster:
    """The live members, as last fetched.

    Args:
        swarm: the network.
        swarm_key: 32 bytes.
        max_members: sets the number of keys.
    """

    def __init__(self, swarm: Swarm, swarm_key: bytes, max_members: int) -> None:
        self._swarm = swarm
        self._box = SecretBox(blake2b(b"xpeer/roster/v1", swarm_key))
        shards = -(-max_members // MEMBERS_PER_SHARD)
        self._keys = [
            blake2b(b"xpeer/roster-key/v1", swarm_key, str(shard).encode()).hex()
            for shard in range(shards)
        ]
        self._members: dict[PeerId, tuple[MemberRecord, float]] = {}

    async def announce(self, record: MemberRecord, ttl_s: float = TTL_S) -> bool:
        """Store our record; whether at least one node took it."""
        sealed = bytes(self._box.encrypt(_pad(msgspec.msgpack.encode(record))))
        me = self._swarm.peer_id
        stored = await self._swarm.dht.store(
            self._key_of(me), sealed, get_dht_time() + ttl_s, subkey=me
        )
        return bool(stored)

    async def refresh(self) -> None:
        """Fetch all records; what does not decrypt or is not the owner's is ignored."""
        found = await self._swarm.dht.get_many(self._keys, sufficient_expiration_time=float("inf"))
        now = get_dht_time()
        for shard in found.values():
            if shard is None or not isinstance(shard.value, dict):
                continue
            for owner, stored in shard.value.items():
                record = self._open(owner, stored.value)
                known = self._members.get(PeerId(owner)) if record else None
                if record and (known is None or known[1] < stored.expiration_time):
                    self._members[PeerId(owner)] = (record, stored.expiration_time)
                    self._swarm.learn(
                        a for a in record.addresses if a.endswith(f"/p2p/{record.peer_id}")
                    )
        self._members = {p: (r, until) for p, (r, until) in self._members.items() if until > now}

    def members(self) -> dict[PeerId, MemberRecord]:
        """Records that have not expired, our own included once it was fetched."""
        now = get_dht_time()
        return {peer: record for peer, (record, until) in self._members.items() if until > now}

    def _key_of(self, peer_id: str) -> str:
        number = int.from_bytes(blake2b(peer_id.encode(), size=4), "big")
        return self._keys[number % len(self._keys)]

    def _open(self, owner: object, sealed: object) -> MemberRecord | None:
        if not isinstance(owner, str) or not isinstance(sealed, bytes):
            return None
        try:
            padded = bytes(self._box.decrypt(sealed))
            record = msgspec.msgpack.decode(_unpad(padded), type=MemberRecord)
        except (CryptoError, ValueError, msgspec.MsgspecError) as e:
            log.debug("a roster record does not open: %s", type(e).__name__)
            return None
        return record if record.peer_id == owner else None


def _pad(data: bytes) -> bytes:
    if len(data) > MAX_RECORD_BYTES:
        raise ValueError(f"a roster record of {len(data)} bytes")
    padded = len(data).to_bytes(2, "big") + data
    return padded + bytes(-len(padded) % PAD_BYTES)


def _unpad(padded: bytes) -> bytes:
    return padded[2 : 2 + int.from_bytes(padded[:2], "big")]
