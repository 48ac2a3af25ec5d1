"""The division of the manifest's corpus among members, and when it is made anew.

Under privacy the division follows declared speeds, and is made anew only when the members change.
Text that goes to another member is also charged by its new member, so both losses add up.
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
"""The corpus is not divided anew before its members have been the same for this long."""
EVERY_S: Final = 600.0
"""Least time between two divisions if only speeds have changed: the trainer has to read the corpus
again. Except once, when the last unknown speed becomes known."""
MOVED: Final = 1 / 16
"""Changed speeds divide the corpus anew only if more than this fraction of it would move."""


class Shares:
    """The division in force, and whether it is out of date.

    Args:
        members: returns tokens/s of all members of the corpus now, ourselves included; 0 = unknown.
        clock: seconds.
        by_speed: divide anew when speeds change, too.
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

    def divide(self) -> dict[str, float]:
        """Divide by the members of now.

        Returns:
            Their tokens/s, by which the corpus is divided.
        """
        self._assigned, self._assigned_s = self._members(), self._clock()
        return self._assigned

    def check_outdated(self) -> bool:
        """True iff two calls in a row found members or speeds that ask for another division.

        Called every `STABLE_S`: it remembers what it found.
        """
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

    async def keep_dividing(
        self, training: Callable[[], bool], renew: Callable[[], Awaitable[None]]
    ) -> None:
        """Watch whether the division is outdated, until cancelled.

        Args:
            training: whether steps are taken now; only then the corpus is divided anew.
            renew: starts the trainer anew, with the new division.
        """
        while True:
            await asyncio.sleep(STABLE_S)
            if self.check_outdated() and training():
                log.info("the shared corpus is divided anew among %d members", len(self._seen))
                await renew()
