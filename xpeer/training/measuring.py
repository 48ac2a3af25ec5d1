"""Losses of the present parameters: when they are measured, and how old they are."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from xpeer.errors import DivergedError, XpeerError
from xpeer.escape import one_line, without_words
from xpeer.manifest import Round
from xpeer.training.schedule import Counters
from xpeer.training.worktime import WorkTime

SHARE: Final = 0.03
"""Of the training time: with short windows not every one is measured."""

logger = logging.getLogger("xpeer.training")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Losses in nats per token, measured on demand."""

    public: Callable[[], float]
    """On the manifest's public text."""
    validation: Callable[[], float] | None = None
    """On held-out text of the shard. Local only."""


class Measurements:
    """The last ones.

    Args:
        evaluation: measures.
        rules: lengths of windows and rounds, for the age.

    Attributes:
        public: nats per token on the public text.
        validation: the same on held-out text of the shard, if there is any. Local only.
        seconds: that all of them took together.
        problem: why the last try failed; empty: it did not.
    """

    def __init__(self, evaluation: Evaluation, rules: Round) -> None:
        self.public: float | None = None
        self.validation: float | None = None
        self._evaluation = evaluation
        self._rules = rules
        self._step = self._merges = 0
        self._taken_at = 0.0
        self.seconds = 0.0
        self.problem = ""
        self._time = WorkTime()

    def take(self, counters: Counters) -> tuple[float, float | None]:
        """Measure now: public and held-out loss."""
        began, evaluation = time.monotonic(), self._evaluation
        try:
            public = evaluation.public()
            validation = evaluation.validation() if evaluation.validation is not None else None
        finally:
            self.seconds += self._time.counted(time.monotonic() - began)
        self.public, self.validation, self.problem = public, validation, ""
        self._step, self._merges = counters.step, counters.merges
        self._taken_at = time.monotonic()
        return public, validation

    @property
    def step(self) -> int | None:
        """At which they were measured; None = not yet."""
        return None if self.public is None else self._step

    @property
    def age_s(self) -> float | None:
        """Seconds since then."""
        return None if self.public is None else time.monotonic() - self._taken_at

    def at_window_end(self, counters: Counters) -> None:
        """Measure, unless that took more than its share already. Training goes on without: what
        fails is told, and tried again when it is due.
        """
        if self.seconds > SHARE * counters.seconds:
            return
        try:
            self.take(counters)
        except Exception as e:  # noqa: BLE001 - e.g. a batch that does not fit into the GPU
            why = one_line(str(e)) if isinstance(e, XpeerError) else without_words(e)
            if not self.problem:
                logger.warning("the loss can't be measured: %s", why)
            self.problem = why

    def public_of_others(self) -> float:
        """Of parameters that stand in for ours; nothing is kept."""
        began = time.monotonic()
        loss = self._evaluation.public()
        self.seconds += self._time.counted(time.monotonic() - began)
        return loss

    def fresh_public(self, counters: Counters) -> float:
        """Of the present parameters, measured if need be."""
        if self.public is None or self.age(counters) > 0:
            self.take(counters)
        return math.nan if self.public is None else self.public

    def age(self, counters: Counters) -> float:
        """Windows of steps, or of merges, since then."""
        steps = (counters.step - self._step) / self._rules.window_steps
        return steps + (counters.merges - self._merges) / self._rules.fragments


def require_finite(loss: float | None, counters: Counters) -> None:
    """Stop a run that has diverged.

    Raises:
        DivergedError: the loss is no number.
    """
    if loss is not None and not math.isfinite(loss):
        raise DivergedError(
            f"training diverged: the loss at step {counters.step} is {loss}",
            "restart from an older checkpoint; lower optimiser.learning_rate in a new swarm",
        )
