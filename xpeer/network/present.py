"""Introductions: the one handler that strangers can call. Bounded, rate-limited, and brief.

A caller presents its credential. If it is valid, it gets ours and the addresses of some members;
if not, a refusal and nothing else.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import TYPE_CHECKING, Annotated

import msgspec
from msgspec import Meta, Struct

from xpeer.errors import NotAuthorisedError, PeerError, Reason
from xpeer.identity import PeerId
from xpeer.network.membership import MAX_CREDENTIAL_BYTES, Membership

if TYPE_CHECKING:
    from xpeer.network.swarm import Swarm

log = logging.getLogger("xpeer.network")

PROTOCOL = "xpeer/present/1"
MAX_TOLD = 16
PER_PEER, ALL_PEERS, PERIOD_S = 20, 400, 10.0
"""Open calls allowed in a period."""


class Introduction(Struct, frozen=True, forbid_unknown_fields=True):
    """The answer to a valid credential."""

    credential: Annotated[bytes, Meta(max_length=MAX_CREDENTIAL_BYTES)]
    """Empty: a bootstrap node without one."""
    addresses: Annotated[list[Annotated[str, Meta(max_length=300)]], Meta(max_length=2 * MAX_TOLD)]


_decoder = msgspec.msgpack.Decoder(Introduction)


class RateLimit:
    """Calls per period, per peer and in all; memory bounded by the total."""

    def __init__(self) -> None:
        self._period = -1
        self._counts: Counter[PeerId] = Counter()

    def allows(self, peer_id: PeerId, *, known: bool) -> bool:
        """Count one call.

        Args:
            peer_id: the caller.
            known: a member already: strangers can't use up what is left for it.
        """
        period = int(time.monotonic() // PERIOD_S)
        if period != self._period:
            self._period = period
            self._counts.clear()
        if self._counts[peer_id] >= PER_PEER:
            return False  # and is not counted: one caller can't use up everybody's
        if not known and self._counts.total() >= ALL_PEERS:
            return False
        self._counts[peer_id] += 1
        return True


async def serve(swarm: Swarm) -> None:
    """Answer introductions."""

    async def handle(peer_id: PeerId, request: bytes) -> bytes:
        try:
            swarm.membership.admit(peer_id, request)
        except NotAuthorisedError as e:
            swarm.strangers_refused += 1
            log.info("refused %s: %s", peer_id[-8:], e)
            return b""
        own = swarm.membership.own
        told = [a for a in await swarm.connected() if not a.endswith(peer_id)]
        answer = Introduction(own.to_bytes() if own else b"", told[: 2 * MAX_TOLD])
        return msgspec.msgpack.encode(answer)

    await swarm.serve_call(PROTOCOL, handle, None, MAX_CREDENTIAL_BYTES)


def take(membership: Membership, peer_id: PeerId, reply: bytes) -> list[str]:
    """Read the answer: remember the peer's credential, return the addresses.

    Raises:
        PeerError: it refused us, or answered nonsense.
    """
    if not reply:
        raise PeerError(Reason.NOT_A_MEMBER, "our credential was refused")
    try:
        introduction = _decoder.decode(reply)
        if introduction.credential:
            membership.admit(peer_id, introduction.credential)
    except (msgspec.MsgspecError, UnicodeDecodeError, NotAuthorisedError) as e:
        raise PeerError(Reason.NOT_A_MEMBER, "its own credential is not valid") from e
    return introduction.addresses
