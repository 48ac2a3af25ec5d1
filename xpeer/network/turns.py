"""Which joiners get parameters now, and what each of them cost.

Bounds are: a place among `limits.max_transfers`, a pause between copies, and for each snapshot a
number of bytes and a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from xpeer.errors import PeerError, Reason
from xpeer.identity import PeerId
from xpeer.network.link import Link
from xpeer.network.rates import MAX_PEERS, Rates

PAUSE_S: Final = 10.0
"""Least time between two donations to one peer, since each costs the trainer a copy."""
MOST_SENT: Final = 2.0
"""A peer is sent at most so many times the bytes of a snapshot, over all its links."""
YIELDS_S: Final = 10.0
"""If all places are taken, a joiner that has asked for nothing for so long makes way; over all its
links, since it was sent a piece."""


@dataclass(slots=True)
class Spent:
    """What one joiner cost us of one snapshot, over all its links."""

    num_bytes: int = 0
    """That it was sent, and that it is sent now."""
    idle_s: float = 0.0
    """Time in which it held a place, and asked for nothing or took too little; `giving` says what
    counts."""
    busy_s: float = 0.0
    """Time that its pieces took, at most what they may take at the least speed."""

    def took(self, seconds: float, at_most_s: float) -> None:
        """Count the time that a piece took. What is beyond `at_most_s` is idle time."""
        self.busy_s += min(seconds, at_most_s)
        self.idle_s += max(0.0, seconds - at_most_s)


class Turns:
    """Decides which joiner gets parameters, and how fast it has to receive them.

    Args:
        most: donations at the same time.
        rates: speeds of transfers so far.
    """

    def __init__(self, most: int, rates: Rates) -> None:
        self.rates = rates
        self._most = most
        self._giving: dict[PeerId, tuple[Link, asyncio.Event]] = {}
        self._ended: dict[PeerId, float] = {}
        """When each peer's last donation ended; kept for PAUSE_S."""
        self._spent: dict[tuple[PeerId, bytes], Spent] = {}
        """On each peer and snapshot, by its root; the latest is the last."""
        self._idle: dict[PeerId, float] = {}
        """Since when each peer that has a place has asked for nothing."""
        self._idled_s: dict[PeerId, float] = {}
        """How long each peer did so before, over all its links, since it was sent a piece."""

    @property
    def joiners(self) -> int:
        """How many have a place now."""
        return len(self._giving)

    async def may_begin(self, peer_id: PeerId, *, held: bool) -> bool:
        """Whether this peer gets pieces now.

        Args:
            peer_id: the joiner.
            held: the snapshot that it asks for is here, and costs the trainer no copy.
        """
        if not held:
            return self._rested(peer_id) and await self._has_place(peer_id)
        await self._end_old(peer_id)
        return await self._has_place(peer_id)

    def sent(self, peer_id: PeerId, root: bytes, num_bytes: int, whole: int) -> None:
        """Count bytes of a snapshot that this peer is sent, over all its links.

        Args:
            peer_id: the joiner.
            root: names the snapshot.
            num_bytes: that it is sent now.
            whole: size of the snapshot.

        Raises:
            PeerError: they are more than MOST_SENT times the snapshot by now (REFUSED).
        """
        spent = self.spent(peer_id, root)
        spent.num_bytes += num_bytes
        if spent.num_bytes > MOST_SENT * whole:
            raise PeerError(Reason.REFUSED, "this joiner asks for everything again and again")

    def spent(self, peer_id: PeerId, root: bytes) -> Spent:
        """What this peer cost us of a snapshot so far; the caller adds to it."""
        spent = self._spent.pop((peer_id, root), None) or Spent()
        self._spent[peer_id, root] = spent
        if len(self._spent) > MAX_PEERS:
            del self._spent[next(iter(self._spent))]
        return spent

    @contextlib.contextmanager
    def idle(self, peer_id: PeerId) -> Iterator[None]:
        """Have a peer that has a place make way for others meanwhile: it asks for nothing."""
        self._idle[peer_id] = time.monotonic()
        try:
            yield
        finally:
            self._idled_s[peer_id] = self._idle_s(peer_id)
            del self._idle[peer_id]
            if len(self._idled_s) > MAX_PEERS:
                del self._idled_s[next(iter(self._idled_s))]

    def sent_piece(self, peer_id: PeerId) -> None:
        """Forget how long this peer asked for nothing."""
        self._idled_s.pop(peer_id, None)

    def _idle_s(self, peer_id: PeerId) -> float:
        return self._idled_s.get(peer_id, 0.0) + time.monotonic() - self._idle[peer_id]

    def _rested(self, peer_id: PeerId) -> bool:
        now = time.monotonic()
        for peer, ended_at in list(self._ended.items()):
            if now - ended_at >= PAUSE_S:
                del self._ended[peer]
        return peer_id not in self._ended

    async def _end_old(self, peer_id: PeerId) -> None:
        """End this peer's old link: it broke, and we have not noticed yet; or it makes way."""
        if peer_id in self._giving:
            link, ended = self._giving[peer_id]
            link.abort()
            await ended.wait()

    async def _has_place(self, peer_id: PeerId) -> bool:
        """Whether there is a place for this peer. A joiner that only holds one makes way."""
        if len(self._giving) >= self._most and self._idle:
            longest = max(self._idle, key=self._idle_s)
            if self._idle_s(longest) >= YIELDS_S:
                await self._end_old(longest)
        return peer_id not in self._giving and len(self._giving) < self._most

    @contextlib.contextmanager
    def giving(self, link: Link) -> Iterator[None]:
        """Count a donation on this link while it runs."""
        ended = asyncio.Event()
        self._giving[link.peer_id] = link, ended
        try:
            yield
        finally:
            del self._giving[link.peer_id]
            self._ended[link.peer_id] = time.monotonic()
            ended.set()
