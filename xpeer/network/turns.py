"""Which joiners get parameters now, and what each of them cost.

Bounds are: a place among `limits.max_transfers`, a time in it while others want it, a pause between
copies, and for each snapshot a number of bytes and a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
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
TURN_S: Final = 900.0
"""If all places are taken, and nobody idles, one of those that have had theirs for so long makes
way, and rests for PAUSE_S: who was sent least in this time. It costs that joiner a piece, as it
comes back for the rest. Nobody makes way who was sent more than half of those with a place: else
identities that come and go, each for less than a turn, would push out all others."""
_MINUTE_S: Final = 60.0


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


class Stay:
    """One joiner's turn in a place, over all its links: who links anew does not begin a new one.

    Attributes:
        began_at: when its turn began.
        left_at: when it had its place last.
        made_way: True from when its turn was ended for a newcomer, until it has a place again.
    """

    def __init__(self) -> None:
        self.began_at, self.made_way = 0.0, False
        self.left_at = -math.inf
        self._minutes: dict[int, int] = {}
        """Bytes that it was sent, by the minute."""

    def enter(self, now: float) -> None:
        """It has a place. Its turn begins anew if it made way, or was away for as long as one."""
        if self.made_way or now - self.left_at >= TURN_S:
            self.began_at, self.made_way = now, False

    def took(self, num_bytes: int, now: float) -> None:
        """Count bytes that it was sent."""
        minutes, minute = self._of_late(now), int(now // _MINUTE_S)
        self._minutes = minutes | {minute: minutes.get(minute, 0) + num_bytes}

    def num_bytes(self, now: float) -> int:
        """Bytes that it was sent in the last TURN_S, over all snapshots."""
        return sum(self._of_late(now).values())

    def _of_late(self, now: float) -> dict[int, int]:
        first = (now - TURN_S) // _MINUTE_S
        return {minute: n for minute, n in self._minutes.items() if minute > first}


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
        self._spent: dict[tuple[PeerId, bytes], Spent] = {}
        """On each peer and snapshot, by its root; the latest is the last."""
        self._idle: dict[PeerId, float] = {}
        """Since when each peer that has a place has asked for nothing."""
        self._idled_s: dict[PeerId, float] = {}
        """How long each peer did so before, over all its links, since it was sent a piece."""
        self._stays: dict[PeerId, Stay] = {}
        """Of each peer that has or had a place; who had one last is the last."""

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
        if held:
            await self._end_old(peer_id)
        needs_rest = not held or self.made_way(peer_id)
        if peer_id in self._giving or (needs_rest and not self._rested(peer_id)):
            return False
        return await self._has_place(peer_id)

    def made_way(self, peer_id: PeerId) -> bool:
        """Whether this peer's turn was ended for a newcomer, and it has had no place since."""
        return peer_id in self._stays and self._stays[peer_id].made_way

    def bytes_of_late(self, peer_id: PeerId) -> int:
        """Bytes of pieces that this peer was sent in the last TURN_S."""
        stay = self._stays.get(peer_id)
        return stay.num_bytes(time.monotonic()) if stay is not None else 0

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

    def sent_piece(self, peer_id: PeerId, num_bytes: int) -> None:
        """Count a piece for this peer's turn, and forget how long it asked for nothing."""
        self._idled_s.pop(peer_id, None)
        self._stays[peer_id].took(num_bytes, time.monotonic())

    def _idle_s(self, peer_id: PeerId) -> float:
        return self._idled_s.get(peer_id, 0.0) + time.monotonic() - self._idle[peer_id]

    def _rested(self, peer_id: PeerId) -> bool:
        stay = self._stays.get(peer_id)
        return stay is None or time.monotonic() - stay.left_at >= PAUSE_S

    async def _end_old(self, peer_id: PeerId) -> None:
        """End this peer's old link: it broke, and we have not noticed yet; or it makes way."""
        if peer_id in self._giving:
            link, ended = self._giving[peer_id]
            link.abort()
            await ended.wait()

    async def _has_place(self, peer_id: PeerId) -> bool:
        """Whether there is a place for this peer. If all are taken, somebody may make way."""
        if len(self._giving) >= self._most:
            if (idle := self._idle_for_long()) is not None:
                await self._end_old(idle)
            elif (last := self._last_in_its_turn()) is not None:
                self._stays[last].made_way = True
                await self._end_old(last)
        return peer_id not in self._giving and len(self._giving) < self._most

    def _idle_for_long(self) -> PeerId | None:
        longest = max(self._idle, key=self._idle_s, default=None)
        return longest if longest is not None and self._idle_s(longest) >= YIELDS_S else None

    def _last_in_its_turn(self) -> PeerId | None:
        """Who was sent least of those whose turn is over, and no more than half of all were."""
        by_bytes = sorted(self._giving, key=self.bytes_of_late)
        now, half = time.monotonic(), (len(by_bytes) + 1) // 2
        over = (p for p in by_bytes[:half] if now - self._stays[p].began_at >= TURN_S)
        return next(over, None)

    @contextlib.contextmanager
    def giving(self, link: Link) -> Iterator[None]:
        """Count a donation on this link while it runs."""
        ended, stay = asyncio.Event(), self._enter(link.peer_id)
        self._giving[link.peer_id] = link, ended
        try:
            yield
        finally:
            del self._giving[link.peer_id]
            stay.left_at = time.monotonic()
            ended.set()

    def _enter(self, peer_id: PeerId) -> Stay:
        self._stays[peer_id] = stay = self._stays.pop(peer_id, None) or Stay()
        stay.enter(time.monotonic())
        if len(self._stays) > MAX_PEERS:
            del self._stays[next(peer for peer in self._stays if peer not in self._giving)]
        return stay
