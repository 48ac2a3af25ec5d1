"""Names and steps of the other members: the daemon asks a few of them at a time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass

from xpeer.errors import PeerError
from xpeer.identity import PeerId
from xpeer.network.about import About

log = logging.getLogger("xpeer.daemon")

EVERY_S = 10.0
AT_ONCE = 8
"""Members asked every `EVERY_S`, at most, so that 4,096 members cost no more than 8."""
MAX_KNOWN = 4096
SHORT = 8
"""Characters of a PeerID's end that stand for it: all PeerIDs begin alike."""


@dataclass(frozen=True, slots=True)
class Heard:
    """A member's answer, and when it came."""

    about: About
    at_s: float


class Acquaintances:
    """The last answer of every member.

    Args:
        clock: wall clock, seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._heard: dict[PeerId, Heard] = {}
        self._asked_s: dict[PeerId, float] = {}

    def get(self, peer: PeerId) -> Heard | None:
        """A member's last answer; None until it answers. One of an earlier version never does."""
        return self._heard.get(peer)

    def name_of(self, peer: PeerId) -> str:
        """A member's name, with the end of its PeerID if another member has the same name.

        A member whose name is unknown is called by the end of its PeerID alone.
        """
        heard, short = self._heard.get(peer), peer[-SHORT:]
        name = heard.about.name if heard else ""
        if not name:
            return short
        alone = sum(other.about.name == name for other in self._heard.values()) == 1
        return name if alone else f"{name}~{short}"

    async def keep_asking(
        self,
        ask: Callable[[PeerId], Awaitable[About]],
        others: Callable[[], Collection[PeerId]],
    ) -> None:
        """Ask a few members every `EVERY_S`, until cancelled."""
        while True:
            await self.ask_some(ask, others())
            await asyncio.sleep(EVERY_S)

    async def ask_some(
        self, ask: Callable[[PeerId], Awaitable[About]], others: Collection[PeerId]
    ) -> None:
        """Ask those `AT_ONCE` members that were never asked, or longest ago."""
        chosen = sorted(others, key=lambda peer: self._asked_s.get(peer, 0.0))[:AT_ONCE]
        await asyncio.gather(*(self._ask(ask, peer) for peer in chosen))
        while len(self._asked_s) > MAX_KNOWN:
            oldest = min(self._asked_s, key=self._asked_s.__getitem__)
            del self._asked_s[oldest]
            self._heard.pop(oldest, None)

    async def _ask(self, ask: Callable[[PeerId], Awaitable[About]], peer: PeerId) -> None:
        self._asked_s[peer] = self._clock()
        try:
            self._heard[peer] = Heard(await ask(peer), self._clock())
        except PeerError as e:  # it runs an earlier version, or can't be reached
            log.debug("%s says nothing about itself: %s", peer[-SHORT:], e)
