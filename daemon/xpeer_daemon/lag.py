"""How late the daemon's event loop wakes its tasks. A loop that is late delays every exchange.

A task that sleeps anyway measures it: it sleeps in short ticks, so that it notices every stall.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from xpeer.health import Health

TICK_S: Final = 0.1
LATE_S: Final = 0.1
"""A look is late if one of its ticks ended this much too late."""
LOOKS, LATE_LOOKS = 5, 3
"""The condition begins when `LATE_LOOKS` of the last `LOOKS` are late; it is over when none is."""
BUSY: Final = 0.5
"""If this thread computed for more than this fraction of a delay, its own work caused the delay."""
OWN_WORK = "work of the daemon's own held it up"
WAITED = "it waited for a disk, or for a core that other processes had"


class Look(NamedTuple):
    """The worst tick of one sleep: when it ended, how late, and this thread's CPU time in it."""

    at_s: float
    late_s: float = 0.0
    busy_s: float = 0.0


class Lag:
    """Sleeps, and notes the condition `loop-late`. Runs on the loop that it measures.

    Args:
        health: gets the condition.
        clock: wall clock, seconds; the same as the health's.
        moment: monotonic clock, seconds.
        busy: CPU time of this thread, seconds.
    """

    def __init__(
        self,
        health: Health,
        clock: Callable[[], float],
        moment: Callable[[], float] = time.monotonic,
        busy: Callable[[], float] = time.thread_time,
    ) -> None:
        self._health = health
        self._clock, self._moment, self._busy = clock, moment, busy
        self._looks: deque[Look] = deque(maxlen=LOOKS)
        self._is_noted = False

    async def sleep(self, seconds: float) -> None:
        """Sleep like `asyncio.sleep`, and measure how late the ticks end."""
        worst, ends_s = Look(self._clock()), self._moment() + seconds
        while (left_s := ends_s - self._moment()) > 0:
            tick_s = min(TICK_S, left_s)
            began_s, busy_s = self._moment(), self._busy()
            await asyncio.sleep(tick_s)
            late_s = self._moment() - began_s - tick_s
            if late_s > worst.late_s:
                worst = Look(self._clock(), late_s, self._busy() - busy_s)
        self.add(worst)

    def add(self, worst: Look) -> None:
        """Add a look, then set or clear the condition by the last `LOOKS`."""
        self._looks.append(worst)
        late = [look for look in self._looks if look.late_s > LATE_S]
        if not late:
            self._health.clear("loop-late")
            self._is_noted = False
        elif self._is_noted or len(late) >= LATE_LOOKS:
            most = max(late, key=lambda look: look.late_s)
            why = OWN_WORK if most.busy_s > BUSY * most.late_s else WAITED
            self._health.set("loop-late", worst_ms=1000 * most.late_s, why=why)
            if not self._is_noted:
                self._health.began("loop-late", late[0].at_s)
            self._is_noted = True
