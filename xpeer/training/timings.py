"""Where the loop's time goes, and how fast it trains."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from xpeer.training.worktime import WorkTime

_SMOOTHING: Final = 0.9
"""Of speeds, per step."""


class Timings:
    """Counters of one loop, since its process began.

    Attributes:
        here_s: time spent training.
        blocked_s: of this, time in which it waited for anything else than computing.
        boundary_s: time at step boundaries.
        saving_s: time for copies of checkpoints.
        step_s: what a step takes, smoothed; 0 until one was taken.
        tokens_per_s: smoothed; 0 until a step was taken.
    """

    def __init__(self) -> None:
        self.here_s = self.blocked_s = self.boundary_s = self.saving_s = 0.0
        self.step_s = self.tokens_per_s = 0.0
        self._rests_until = 0.0
        """End of the rest that began last, monotonic s; 0 until one began."""
        self._work = WorkTime()

    @property
    def rest_s(self) -> float:
        """Left of the rest that began last."""
        return max(0.0, self._rests_until - time.monotonic())

    @contextmanager
    def at_boundary(self) -> Iterator[None]:
        """Count the time of the block as a boundary's."""
        began = time.perf_counter()
        yield
        self.boundary_s += time.perf_counter() - began

    @contextmanager
    def waiting_for_the_ledger(self) -> Iterator[None]:
        """Count the time of the block as blocked, but for checkpoints that are copied in it."""
        began, saving_s = time.perf_counter(), self.saving_s
        yield
        saved_s = self.saving_s - saving_s
        self.blocked_s += time.perf_counter() - began - saved_s

    @contextmanager
    def waiting_for_the_group(self) -> Iterator[None]:
        """Count the time of the block as blocked."""
        began = time.monotonic()
        yield
        self.blocked_s += time.monotonic() - began

    @contextmanager
    def step(self) -> Iterator[None]:
        """The block is a step."""
        began = time.perf_counter()
        yield
        took_s = time.perf_counter() - began
        self.step_s = _SMOOTHING * (self.step_s or took_s) + (1 - _SMOOTHING) * took_s

    def worked(self, seconds: float, tokens: int) -> float:
        """A step took so long by the clock; how much of it counts as work."""
        worked_s = self._work.counted(seconds)
        self.here_s += worked_s
        speed = tokens / max(worked_s, 1e-9)
        if self.tokens_per_s == 0.0:
            self.tokens_per_s = speed
        self.tokens_per_s = _SMOOTHING * self.tokens_per_s + (1 - _SMOOTHING) * speed
        return worked_s

    def begin_rest(self, worked_s: float, throttle: float) -> float:
        """Rest after so much work; for how long, s.

        Args:
            worked_s: since the last rest.
            throttle: fraction of the time to work in; 1 = no rest.
        """
        rest_s = 0.0
        if throttle < 1.0 and self._work.known:
            rest_s = worked_s * (1.0 - throttle) / throttle
        self._rests_until = time.monotonic() + rest_s
        return rest_s
