"""Introductions: the only handler that strangers can call. It is bounded and rate-limited.

A caller presents its credential. If it is valid, we answer with ours and the addresses of some
members. If not, we refuse and say nothing else. A caller remembers who knows it. It does not call a
peer that refused it for a while.
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
MAX_MEMBERS_NAMED = 16
PER_PEER, ALL_PEERS, PERIOD_S = 20, 400, 10.0
"""Calls allowed in a period: so many of one peer. After so many in all, strangers are refused."""
KNOWN_S = 600.0
"""After this long we introduce ourselves again. A restarted peer has forgotten us. It says so when
we call it, and before an exchange it hears of us from the roster."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
"""How long we do not call a peer that refused our credential. Each refusal doubles the pause."""
MAX_NOTED = 4096


@seen_by("anybody")
class Introduction(Struct, frozen=True, forbid_unknown_fields=True):
    """The answer to a valid credential."""

    credential: Public[Annotated[bytes, Meta(max_length=MAX_CREDENTIAL_BYTES)]]
    """The answering peer's own; empty for a bootstrap node that has none."""
    addresses: Public[
        Annotated[
            list[Annotated[str, Meta(max_length=300)]], Meta(max_length=2 * MAX_MEMBERS_NAMED)
        ]
    ]
    """Addresses of members, each with /p2p/PEERID."""


_decoder = msgspec.msgpack.Decoder(Introduction)


class RateLimit:
    """Limits the calls in a period, per peer and in all. The total bounds its memory, too."""

    def __init__(self) -> None:
        self._period = -1
        self._counts: Counter[PeerId] = Counter()

    def allows(self, peer_id: PeerId, *, known: bool) -> bool:
        """Count a call; whether it is within the limits.

        Args:
            peer_id: the caller.
            known: True iff the caller is a member; strangers can't use up a member's calls.
        """
        period = int(time.monotonic() // PERIOD_S)
        if period != self._period:
            self._period = period
            self._counts.clear()
        if self._counts[peer_id] >= PER_PEER:
            return False  # not counted: one caller must not use up the calls of all
        if not known and self._counts.total() >= ALL_PEERS:
            return False
        self._counts[peer_id] += 1
        return True


class Introduced:
    """Which peers have seen our credential lately, and which refused it: at most MAX_NOTED each.

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
        """Note that this peer knows us now."""
        self._refused.pop(peer_id, None)
        _put(self._since, peer_id, self._clock())

    def refused(self, peer_id: PeerId) -> None:
        """Note that this peer refused our credential, and do not call it for a while."""
        self._since.pop(peer_id, None)
        _, pause_s = self._refused.get(peer_id, (0.0, FIRST_PAUSE_S / 2))
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        _put(self._refused, peer_id, (self._clock() + pause_s, pause_s))

    def is_left_alone(self, peer_id: PeerId) -> bool:
        """Whether this peer refused us so lately that we do not call it yet."""
        until, _ = self._refused.get(peer_id, (0.0, 0.0))
        return self._clock() < until

    def forget(self, peer_id: PeerId) -> None:
        """Note that this peer may have forgotten us."""
        self._since.pop(peer_id, None)

    def clear(self) -> None:
        """Note that nobody knows us, and that nobody refused us."""
        self._since.clear()
        self._refused.clear()


def _put(notes: OrderedDict[PeerId, _T], peer_id: PeerId, note: _T) -> None:
    notes[peer_id] = note
    notes.move_to_end(peer_id)
    if len(notes) > MAX_NOTED:
        notes.popitem(last=False)


async def serve(swarm: Swarm) -> None:
    """Answer introductions.

    A member that keeps a roster sends addresses only to newcomers: a peer that it knows already
    gets them from the roster.
    """
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
        addresses: list[str] = []
        if not (known and has_roster):
            addresses = [a for a in await swarm.connected() if not a.endswith(peer_id)]
        answer = Introduction(own.to_bytes() if own else b"", addresses[: 2 * MAX_MEMBERS_NAMED])
        return msgspec.msgpack.encode(answer)

    await swarm.serve_call(PROTOCOL, handle, None, MAX_CREDENTIAL_BYTES)


def take(membership: Membership, peer_id: PeerId, reply: bytes) -> list[str]:
    """Read the answer to an introduction: remember the peer's credential, return the addresses.

    Raises:
        PeerError: the peer refused us, or answered nonsense.
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
