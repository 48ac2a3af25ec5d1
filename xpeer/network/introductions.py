"""Introductions: the one handler that strangers can call. Bounded, rate-limited, and brief.

A caller presents its credential. If it is valid, it gets ours and the addresses of some members;
if not, a refusal and nothing else. Callers remember who knows them, and leave alone who refused.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from xpeer.errors import NotAuthorisedError, PeerError, Reason
from xpeer.identity import PeerId
from xpeer.leaves import Public, seen_by
from xpeer.network.membership.certificates import (
    MAX_CREDENTIAL_BYTES,
    Certificate,
    Membership,
    unpack,
)

if TYPE_CHECKING:
    from xpeer.network.swarm import Swarm

log = logging.getLogger("xpeer.network")
_T = TypeVar("_T")

PROTOCOL = "xpeer/present/1"
MAX_TOLD = 16
PER_PEER, ALL_PEERS, PERIOD_S = 20, 400, 10.0
"""Open calls allowed in a period."""
KNOWN_S = 600.0
"""Then we introduce ourselves again. A restarted peer that has forgotten us tells so when it is
called, and learns of us from the roster before it exchanges anything."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""How long a peer that refused our credential is left alone; doubled every time."""
MAX_NOTED = 4096


@seen_by("anybody")
class Introduction(Struct, frozen=True, forbid_unknown_fields=True):
    """The answer to a valid credential."""

    credential: Public[Annotated[bytes, Meta(max_length=MAX_CREDENTIAL_BYTES)]]
    """Empty: a bootstrap node without one."""
    addresses: Public[
        Annotated[list[Annotated[str, Meta(max_length=300)]], Meta(max_length=2 * MAX_TOLD)]
    ]


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


class Introduced:
    """Who has seen our credential lately, and who refused it; bounded.

    Args:
        clock: monotonic, seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: OrderedDict[PeerId, float] = OrderedDict()
        self._refused: OrderedDict[PeerId, tuple[float, float]] = OrderedDict()

    def __contains__(self, peer_id: PeerId) -> bool:
        since = self._since.get(peer_id)
        return since is not None and self._clock() - since < KNOWN_S

    def accepted(self, peer_id: PeerId) -> None:
        """It knows us now."""
        self._refused.pop(peer_id, None)
        _put(self._since, peer_id, self._clock())

    def refused(self, peer_id: PeerId) -> None:
        """It does not want to know us: leave it alone for a while."""
        self._since.pop(peer_id, None)
        _, pause_s = self._refused.get(peer_id, (0.0, FIRST_PAUSE_S / 2))
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        _put(self._refused, peer_id, (self._clock() + pause_s, pause_s))

    def is_left_alone(self, peer_id: PeerId) -> bool:
        """Whether it refused us a moment ago."""
        until, _ = self._refused.get(peer_id, (0.0, 0.0))
        return self._clock() < until

    def forget(self, peer_id: PeerId) -> None:
        """It may know nothing of us any more."""
        self._since.pop(peer_id, None)

    def clear(self) -> None:
        """Nobody knows us."""
        self._since.clear()
        self._refused.clear()


def _put(notes: OrderedDict[PeerId, _T], peer_id: PeerId, note: _T) -> None:
    notes[peer_id] = note
    notes.move_to_end(peer_id)
    if len(notes) > MAX_NOTED:
        notes.popitem(last=False)


async def serve(swarm: Swarm) -> None:
    """Answer introductions; a member tells those that it knows of others in its roster alone."""
    mine = swarm.membership.own
    role = unpack(mine.body, Certificate, "certificate").role if mine else "infrastructure"
    has_roster = role != "infrastructure"

    async def handle(peer_id: PeerId, request: bytes) -> bytes:
        known = swarm.membership.certificate_of(peer_id) is not None
        try:
            swarm.membership.admit(peer_id, request)
        except NotAuthorisedError as e:
            swarm.strangers_refused += 1
            log.info("refused %s: %s", peer_id[-8:], e)
            return b""
        own = swarm.membership.own
        told: list[str] = []
        if not (known and has_roster):
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
