"""Who shares the manifest's corpus, at what speed, and when it is divided anew.

Under privacy the division follows declared speeds and changes with the members alone: whatever
changes hands is charged to a second ledger, and what its records lose adds up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from xpeer.roster.roster import TTL_S
from xpeer.training import partition

log = logging.getLogger("xpeer.shares")

STABLE_S: Final = 2 * TTL_S
"""Nothing is divided anew before those who share have been the same for this long."""
EVERY_S: Final = 600.0
"""Changed speeds alone divide anew no more often, but for the first that are known: the trainer
reads the corpus again."""
MOVED: Final = 1 / 16
"""And only if this share of the corpus would change hands."""


class Shares:
    """The division in force, and whether it is out of date.

    Args:
        members: tokens/s of all who share the corpus now, ourselves included; 0 = unknown.
        by_speed: divide anew when speeds change, too.
        clock: seconds.
    """

    def __init__(
        self,
        members: Callable[[], dict[str, float]],
        clock: Callable[[], float],
        *,
        by_speed: bool,
    ) -> None:
        self._members, self._clock, self._by_speed = members, clock, by_speed
        self._assigned: dict[str, float] = {}
        self._assigned_s = 0.0
        self._seen: dict[str, float] = {}

    def take(self) -> dict[str, float]:
        """Divide by what is known now."""
        self._assigned, self._assigned_s = self._members(), self._clock()
        return self._assigned

    def look(self) -> bool:
        """Whether to divide anew, to be asked every STABLE_S: twice the same is settled."""
        before, self._seen = self._seen, self._members()
        return self._out_of_date(before) and self._out_of_date(self._seen)

    def _out_of_date(self, seen: Mapping[str, float]) -> bool:
        if seen.keys() != self._seen.keys():
            return False
        if seen.keys() != self._assigned.keys():
            return True
        guessed = not all(self._assigned.values()) and all(seen.values())
        rested = guessed or self._clock() - self._assigned_s >= EVERY_S
        return self._by_speed and rested and partition.moved(self._assigned, seen) > MOVED

    async def keep(
        self, training: Callable[[], bool], renew: Callable[[], Awaitable[None]]
    ) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(STABLE_S)
            if self.look() and training():
                log.info("the shared corpus is divided anew among %d members", len(self._seen))
                await renew()
