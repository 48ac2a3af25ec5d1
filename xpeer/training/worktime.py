"""How much of the time that passed was work.

A clock also counts what was none: a process that was stopped, a machine that was suspended or out
of memory. So of one piece of work at most four times the usual counts.
"""

from __future__ import annotations

import statistics
from collections import deque
from typing import Final

MOST: Final = 4.0
"""Of the median: real steps vary less, with the batch and with what else runs."""
_REMEMBERED: Final = 32


class WorkTime:
    """Durations of work of one kind."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)

    @property
    def known(self) -> bool:
        """Whether more than one is known: the first says little, and may have been interrupted."""
        return len(self._seconds) > 1

    @property
    def usual(self) -> float:
        """The median of the last ones, s; 0 while none is known."""
        return statistics.median_low(self._seconds) if self._seconds else 0.0

    def counted(self, seconds: float) -> float:
        """One more took so long by the clock; how much of it counts as work."""
        self._seconds.append(seconds)
        return min(seconds, MOST * self.usual)
