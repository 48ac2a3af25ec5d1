"""Estimates how much of the time that passed was work.

A clock also counts time in which the process was stopped, or the machine was suspended or out of
memory. So one piece of work counts as at most four times the usual time.
"""

from __future__ import annotations

import statistics
from collections import deque
from typing import Final

MOST: Final = 4.0
"""Most multiples of the median that count. Real steps vary less, with the batch and other load."""
_REMEMBERED: Final = 32


class WorkTime:
    """Durations of work of one kind."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)

    @property
    def known(self) -> bool:
        """Whether there were at least two: one says little, and may have been interrupted."""
        return len(self._seconds) > 1

    @property
    def usual(self) -> float:
        """The median of the last durations, s; 0 until there is one."""
        return statistics.median_low(self._seconds) if self._seconds else 0.0

    def counted(self, seconds: float) -> float:
        """Add a duration by the clock, s; returns how much of it counts as work."""
        self._seconds.append(seconds)
        return min(seconds, MOST * self.usual)
