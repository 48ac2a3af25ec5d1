"""Counts where the loop's time goes, and how fast it trains."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from xpeer.training.worktime import WorkTime

_SMOOTHING: Final = 0.9
"""Weight of the past in smoothed values, per step."""


class Timings:
    """Counters of one loop, since its process began. All are seconds, except tokens_per_s.

    Attributes:
        here_s: time spent in the loop: steps, waits and boundaries, but no rests and no pauses.
        blocked_s: time in it that the loop waited for the ledger or the group.
        boundary_s: time in it at step boundaries.
        saving_s: time that copying checkpoints took.
        step_s: duration of a step, smoothed; 0 until the first one.
        tokens_per_s: speed, smoothed; 0 until the first step.
    """

    def __init__(self) -> None:
        self.here_s = self.blocked_s = self.boundary_s = self.saving_s = 0.0
        self.step_s = self.tokens_per_s = 0.0
        self._rests_until = 0.0
        """End of the last rest, monotonic s; 0 until the first one begins."""
        self._work = WorkTime()

    @property
    def rest_s(self) -> float:
        """Seconds left of the last rest."""
        return max(0.0, self._rests_until - time.monotonic())

    @contextmanager
    def at_boundary(self) -> Iterator[None]:
        """Count the time of the block as time at a boundary."""
        began = time.perf_counter()
        yield
        took_s = time.perf_counter() - began
        self.boundary_s += took_s
        self.here_s += took_s

    @contextmanager
    def waiting_for_the_ledger(self) -> Iterator[None]:
        """Count the time of the block as blocked, except for copying checkpoints."""
        began, saving_s = time.perf_counter(), self.saving_s
        yield
        saved_s = self.saving_s - saving_s
        self._waited(time.perf_counter() - began - saved_s)

    @contextmanager
    def waiting_for_the_group(self) -> Iterator[None]:
        """Count the time of the block as blocked."""
        began = time.monotonic()
        yield
        self._waited(time.monotonic() - began)

    def _waited(self, seconds: float) -> None:
        self.blocked_s += seconds
        self.here_s += seconds

    @contextmanager
    def step(self) -> Iterator[None]:
        """Count the time of the block as a step."""
        began = time.perf_counter()
        yield
        took_s = time.perf_counter() - began
        self.step_s = _SMOOTHING * (self.step_s or took_s) + (1 - _SMOOTHING) * took_s

    def worked(self, seconds: float, tokens: int) -> float:
        """Count a step that took so long by the clock; returns how much of it counts as work.

        Args:
            seconds: without the time that the loop was blocked in it.
            tokens: that the step was taken on.
        """
        worked_s = self._work.counted(seconds)
        self.here_s += worked_s
        speed = tokens / max(worked_s, 1e-9)
        if self.tokens_per_s == 0.0:
            self.tokens_per_s = speed
        self.tokens_per_s = _SMOOTHING * self.tokens_per_s + (1 - _SMOOTHING) * speed
        return worked_s

    def begin_rest(self, worked_s: float, throttle: float) -> float:
        """Begin a rest after so much work; returns its duration, s.

        Args:
            worked_s: time worked since the last rest.
            throttle: fraction of the time to work in; 1 = no rest.
        """
        rest_s = 0.0
        if throttle < 1.0 and self._work.known:
            rest_s = worked_s * (1.0 - throttle) / throttle
        self._rests_until = time.monotonic() + rest_s
        return rest_s
