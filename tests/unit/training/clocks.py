"""A clock that tests set, in the place of `time`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Clock:
    """Seconds that pass when somebody says so, and `tick` more whenever anybody asks."""

    now: float = 0.0
    tick: float = 0.0

    def __call__(self) -> float:
        self.now += self.tick
        return self.now

    # what `time` offers
    monotonic = perf_counter = time = __call__

    def advance(self, seconds: float) -> None:
        self.now += seconds
