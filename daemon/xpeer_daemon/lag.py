"""How late the daemon's event loop wakes its tasks: what holds it up holds up every exchange.

Measured by a task that sleeps anyway, in short parts, so that a stall between two looks is seen.
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
"""A task that is woken so much too late, once between two looks, makes the look a late one."""
LOOKS, LATE_LOOKS = 5, 3
"""So many of the last looks have to be late; it is over when none of them is."""
BUSY: Final = 0.5
"""Of the delay: whoever computed for more of it held up the others."""
OWN_WORK = "work of the daemon's own held it up"
WAITED = "it waited for a disk, or for a core that other processes had"


class Look(NamedTuple):
    """The worst tick since the look before."""

    at_s: float
    late_s: float = 0.0
    busy_s: float = 0.0


class Lag:
    """Sleeps, and notes `loop-late`. Runs on the loop that it measures.

    Args:
        health: is told.
        clock: wall clock, seconds; as the health's.
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
        self._shown = False

    async def sleep(self, seconds: float) -> None:
        """As asyncio's, and a look at the end."""
        worst, ends_s = Look(self._clock()), self._moment() + seconds
        while (left_s := ends_s - self._moment()) > 0:
            tick_s = min(TICK_S, left_s)
            began_s, busy_s = self._moment(), self._busy()
            await asyncio.sleep(tick_s)
            late_s = self._moment() - began_s - tick_s
            if late_s > worst.late_s:
                worst = Look(self._clock(), late_s, self._busy() - busy_s)
        self.look(worst)

    def look(self, worst: Look) -> None:
        """Note what follows from the last looks."""
        self._looks.append(worst)
        late = [look for look in self._looks if look.late_s > LATE_S]
        if not late:
            self._health.clear("loop-late")
            self._shown = False
        elif self._shown or len(late) >= LATE_LOOKS:
            most = max(late, key=lambda look: look.late_s)
            why = OWN_WORK if most.busy_s > BUSY * most.late_s else WAITED
            self._health.set("loop-late", worst_ms=1000 * most.late_s, why=why)
            if not self._shown:
                self._health.began("loop-late", late[0].at_s)
            self._shown = True
