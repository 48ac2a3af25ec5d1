"""Who is alive: every member's own record in the DHT, signed, encrypted, and expiring.

A record lies under a keyed hash of the swarm key and is padded, so a node without the key sees who
stores (the owner's PeerID and signature) and when, and nothing else. The roster is spread over
several keys: the DHT returns a key's dictionary whole.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar

import msgspec
from hivemind.utils import get_dht_time
from msgspec import Meta, Struct
from nacl.exceptions import CryptoError
from nacl.secret import SecretBox

from xpeer.identity import PeerId, blake2b
from xpeer.network.addresses import is_dialled, peer_of
from xpeer.network.membership import Role
from xpeer.network.swarm import Swarm

log = logging.getLogger("xpeer.network")

TTL_S = 40.0
ANNOUNCE_EVERY_S = 10.0
MEMBERS_PER_SHARD = 64
PAD_BYTES = 256
MAX_RECORD_BYTES = 2048
DHT_TIMEOUT_S = 15.0
_T = TypeVar("_T")


class MemberRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """What a member says of itself. Nothing in it depends on its text."""

    peer_id: Annotated[str, Meta(max_length=80)]
    addresses: Annotated[list[Annotated[str, Meta(max_length=300)]], Meta(max_length=8)]
    role: Role
    phase: Annotated[str, Meta(max_length=20, pattern="^[a-z-]+$")]
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
        self._max_members = max_members

    async def announce(self, record: MemberRecord, ttl_s: float = TTL_S) -> bool:
        """Store our record; whether at least one node took it."""
        sealed = bytes(self._box.encrypt(_pad(msgspec.msgpack.encode(record))))
        me = self._swarm.peer_id
        stored = await self._ask(
            self._swarm.dht.store(self._key_of(me), sealed, get_dht_time() + ttl_s, subkey=me)
        )
        return bool(stored)

    async def refresh(self) -> None:
        """Fetch all records; what does not decrypt or is not the owner's is ignored."""
        found = await self._ask(
            self._swarm.dht.get_many(self._keys, sufficient_expiration_time=math.inf)
        )
        now = get_dht_time()
        self._members = {p: (r, until) for p, (r, until) in self._members.items() if until > now}
        for shard in (found or {}).values():
            if shard is None or not isinstance(shard.value, dict):
                continue
            for owner, stored in shard.value.items():
                record = self._open(owner, stored.value)
                if record is not None:
                    self._note(record, stored.expiration_time)

    async def _ask(self, request: Coroutine[Any, Any, _T]) -> _T | None:
        """The DHT's answer; None if there is none: a sidecar that restarts must not end the node.

        hivemind's node raises whatever happened to it, and has searches without a deadline.
        """
        try:
            async with asyncio.timeout(DHT_TIMEOUT_S):
                return await request
        except TimeoutError:
            log.warning("the DHT does not answer")
        except Exception:  # logged: the next announcement or refresh is seconds away
            log.warning("the DHT failed", exc_info=True)
        return None

    def _note(self, record: MemberRecord, until: float) -> None:
        peer_id = PeerId(record.peer_id)
        known = self._members.get(peer_id)
        if known is None and len(self._members) >= self._max_members:
            log.warning("more than limits.max_members = %d members", self._max_members)
            return
        if until > get_dht_time() and (known is None or known[1] < until):
            self._members[peer_id] = (record, until)
            self._swarm.learn(record.addresses)

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
        certificate = self._swarm.membership.certificate_of(owner)
        if record.peer_id != owner or certificate is None:
            return None
        # What the owner can lie about is replaced by what the admin signed, or dropped.
        own = [a for a in record.addresses if is_dialled(a) and peer_of(a) == owner]
        return msgspec.structs.replace(record, role=certificate.role, addresses=own)


def _pad(data: bytes) -> bytes:
    if len(data) > MAX_RECORD_BYTES:
        raise ValueError(f"a roster record of {len(data)} bytes")
    padded = len(data).to_bytes(2, "big") + data
    return padded + bytes(-len(padded) % PAD_BYTES)


def _unpad(padded: bytes) -> bytes:
    return padded[2 : 2 + int.from_bytes(padded[:2], "big")]
