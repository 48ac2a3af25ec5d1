"""Members' cards in the DHT, for nodes that know nobody yet: sealed, padded, spread over many keys.

hivemind always returns a key's whole dictionary. So the number of keys grows with the number of
members that a swarm may have, and about 15 kB lie under one key. The names of keys are derived from
the swarm key.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Coroutine
from typing import Any, TypeVar

import msgspec
from msgspec import Struct
from nacl.exceptions import CryptoError

from xpeer.identity import blake2b
from xpeer.leaves import Parts, seen_by
from xpeer.network.membership.keyring import KeyRing
from xpeer.network.swarm import Swarm
from xpeer.roster.cards import Beat, SignedCard

log = logging.getLogger("xpeer.network")

MEMBERS_PER_SHARD = 16
STORED_S = 900.0
DHT_TIMEOUT_S = 15.0
PAD_BYTES = 256
MAX_RECORD_BYTES = 2560
_SEALED, _NAMED = b"xpeer/shard/v1", b"xpeer/shard-key/v1"
"""Purposes of keys that are derived from the swarm key."""
_T = TypeVar("_T")


@seen_by("members")
class Stored(Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """A member's record in the DHT. `dht.SignedValue` adds the credential."""

    signed: Parts[SignedCard]
    beat: Parts[Beat]


class Shards:
    """The DHT keys under which a swarm's cards lie.

    Args:
        swarm: the network.
        keyring: has the swarm key, which seals cards and names keys.
        max_members: sets the number of keys.
    """

    def __init__(self, swarm: Swarm, keyring: KeyRing, max_members: int) -> None:
        self._swarm = swarm
        self._keyring = keyring
        self._number = -(-max_members // MEMBERS_PER_SHARD)
        self._names: list[str] = []
        self._named_in: int | None = None
        """Key epoch of `_names`. None until `keys` was first read."""

    @property
    def keys(self) -> list[str]:
        """Names of all keys, under the current swarm key."""
        if self._named_in != self._keyring.key_epoch:
            numbers = (str(number).encode() for number in range(self._number))
            self._names = [self._keyring.derived(_NAMED, number).hex() for number in numbers]
            self._named_in = self._keyring.key_epoch
        return self._names

    def key_of(self, peer_id: str) -> str:
        """The key under which a member's card lies."""
        number = int.from_bytes(blake2b(peer_id.encode(), size=4), "big")
        return self.keys[number % self._number]

    async def store(self, stored: Stored, now_s: float) -> bool:
        """Store our own card. True iff at least one node accepted it."""
        me = self._swarm.peer_id
        box = self._keyring.box(_SEALED)
        sealed = bytes(box.encrypt(_pad(msgspec.msgpack.encode(stored))))
        storing = self._swarm.dht.store(self.key_of(me), sealed, now_s + STORED_S, subkey=me)
        return bool(await self._ask(storing))

    async def read(self, keys: list[str]) -> list[tuple[str, Stored]]:
        """Owners with the records that they stored. Records that do not open are left out."""
        answer = await self._ask(
            self._swarm.dht.get_many(keys, sufficient_expiration_time=math.inf)
        )
        opened = []
        for dictionary in (answer or {}).values():
            if dictionary is None or not isinstance(dictionary.value, dict):
                continue
            for owner, item in dictionary.value.items():
                stored = self._open(item.value)
                if isinstance(owner, str) and stored is not None:
                    opened.append((owner, stored))
        return opened

    async def _ask(self, request: Coroutine[Any, Any, _T]) -> _T | None:
        """The DHT's answer; None if it fails or is late.

        hivemind's node raises errors of any type, and some searches have no deadline. A sidecar
        that restarts must not end this node.
        """
        try:
            async with asyncio.timeout(DHT_TIMEOUT_S):
                return await request
        except TimeoutError:
            log.warning("the DHT does not answer")
        except Exception:  # only logged: the next announcement or refresh is seconds away
            log.warning("the DHT failed", exc_info=True)
        return None

    def _open(self, sealed: object) -> Stored | None:
        if not isinstance(sealed, bytes):
            return None
        try:
            padded = bytes(self._keyring.box(_SEALED).decrypt(sealed))
            return msgspec.msgpack.decode(_unpad(padded), type=Stored)
        except (CryptoError, ValueError, msgspec.MsgspecError) as e:
            log.debug("a stored card does not open: %s", type(e).__name__)
            return None


def _pad(data: bytes) -> bytes:
    if len(data) > MAX_RECORD_BYTES:
        raise ValueError(f"a roster record of {len(data)} bytes")
    padded = len(data).to_bytes(2, "big") + data
    return padded + bytes(-len(padded) % PAD_BYTES)


def _unpad(padded: bytes) -> bytes:
    return padded[2 : 2 + int.from_bytes(padded[:2], "big")]
