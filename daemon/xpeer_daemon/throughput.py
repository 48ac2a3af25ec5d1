"""The speed that this node publishes: measured over minutes, and coarse.

It counts planned tokens (steps times batch times sequence), never those that a batch really had.
"""

from __future__ import annotations

import math
from typing import Final

SPAN_S: Final = 60.0
"""One measurement takes this long."""
GAP_S: Final = 10.0
GAP: Final = 8.0
"""`observe` is called at least once a step. If its calls are further apart than GAP_S, and than GAP
times the longest gap before, there was no training: the machine was suspended, or we were
stopped."""
SMOOTHING: Final = 0.5
LEVELS: Final = 4
"""Published values are powers of 2^(1/LEVELS): 19% apart."""
STICKINESS: Final = 0.75
"""The published value stays until the measured one is this many levels off. Half a level would be
plain rounding, which flickers."""


class Throughput:
    """Measures tokens/s by counting steps.

    Args:
        tokens_per_step: planned tokens of a step.

    Attributes:
        published: tokens/s, coarse; 0 = not measured yet.
    """

    def __init__(self, tokens_per_step: int) -> None:
        self.published = 0.0
        self._tokens_per_step = tokens_per_step
        self._smoothed = 0.0
        self._since: tuple[int, float] | None = None  # (step, busy seconds)
        self._looked_s, self._longest_s = 0.0, 0.0

    def observe(self, step: int, now_s: float, blocked_s: float) -> None:
        """Note how many steps are done; called while the node trains, at least once a step.

        Args:
            step: optimiser steps so far.
            now_s: the time by any clock, seconds.
            blocked_s: seconds so far in which the trainer waited and did not compute.
        """
        busy_s, gap_s, self._looked_s = now_s - blocked_s, now_s - self._looked_s, now_s
        if self._since is not None:
            if self._longest_s and gap_s > max(GAP_S, GAP * self._longest_s):
                self._since = None
            else:
                self._longest_s = max(self._longest_s, gap_s)
        if self._since is None or step < self._since[0] or busy_s < self._since[1]:
            self._since = (step, busy_s)
            return
        steps, span_s = step - self._since[0], busy_s - self._since[1]
        if span_s < SPAN_S or not steps:
            return
        self._since = (step, busy_s)
        speed = steps * self._tokens_per_step / span_s
        if self._smoothed:
            speed = SMOOTHING * self._smoothed + (1 - SMOOTHING) * speed
        self._smoothed = speed
        level = LEVELS * math.log2(speed)
        if not self.published or abs(level - LEVELS * math.log2(self.published)) > STICKINESS:
            self.published = 2.0 ** (round(level) / LEVELS)

    def interrupt(self) -> None:
        """Leave out the time from here to the next step: no steps are taken now."""
        self._since = None
