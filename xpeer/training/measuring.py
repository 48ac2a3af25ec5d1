"""Measures the losses of the present parameters, now and then, and knows how old they are."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from xpeer.errors import DivergedError, LocalError, PeerError, Reason, XpeerError
from xpeer.escape import one_line, without_words
from xpeer.manifest.round import Round
from xpeer.privacy.steps import Records
from xpeer.shortage import out_of_memory
from xpeer.training.schedule import Counters
from xpeer.training.worktime import WorkTime

SHARE: Final = 0.02
"""Fraction of the training time that measuring may take; so some short windows are skipped."""

logger = logging.getLogger("xpeer.training")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Functions that measure losses, in nats per token."""

    public: Callable[[], float]
    """Measures the loss on the manifest's public text."""
    validation: Callable[[], float] | None = None
    """Measures the loss on held-out text of the shard; None = there is none. Local only."""
    of_others: Callable[[], float] | None = None
    """As `public`, of others' parameters in the place of ours; nothing is remembered of them. None
    = `public` remembers nothing."""
    of_any_tokens: Callable[[], float] | None = None
    """Measures the loss on tokens of the whole vocabulary, in any order. None = nothing can."""
    of_copy: Callable[[torch.Tensor], float] | None = None
    """Measures the loss of other parameters, (num_params,) float32, CPU, on the public text; on any
    thread, while the model trains. None = nothing can."""


class Measurements:
    """The losses that were measured last.

    Args:
        evaluation: measures the losses.
        rules: section of the manifest with the lengths of windows, for the age.
        begin_misalignment: begins to measure what averaging the adapters loses, on another thread;
            None = the model has none.

    Attributes:
        public: nats per token on the public text; None until it was measured.
        validation: nats per token on held-out text of the shard; None until it was measured, or if
            there is no such text. Local only.
        seconds: time that all measurements took so far.
        problem: why the last attempt failed; empty = it did not.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        rules: Round,
        begin_misalignment: Callable[[], None] | None = None,
    ) -> None:
        self.public: float | None = None
        self.validation: float | None = None
        self._evaluation = evaluation
        self._begin_misalignment = begin_misalignment
        self._rules = rules
        self._step = self._merges = 0
        self._measured_at = 0.0
        self.seconds = 0.0
        self.problem = ""
        self._time = WorkTime()

    def take(self, counters: Counters) -> tuple[float, float | None]:
        """Measure the public and the held-out loss now."""
        began, evaluation = time.monotonic(), self._evaluation
        try:
            public = evaluation.public()
            validation = evaluation.validation() if evaluation.validation is not None else None
            if self._begin_misalignment is not None:
                self._begin_misalignment()
        finally:
            self.seconds += self._time.counted(time.monotonic() - began)
        self.public, self.validation, self.problem = public, validation, ""
        self._step, self._merges = counters.step, counters.merges
        self._measured_at = time.monotonic()
        return public, validation

    @property
    def step(self) -> int | None:
        """The step of the last measurement; None until there is one."""
        return None if self.public is None else self._step

    @property
    def age_s(self) -> float | None:
        """Seconds since the last measurement; None until there is one."""
        return None if self.public is None else time.monotonic() - self._measured_at

    def at_window_end(self, counters: Counters) -> None:
        """Measure, unless measuring has taken more than its fraction of the time already.

        If it fails, training goes on: the failure is logged, and the next window tries again.
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
        """Measure the public loss of parameters that stand in for ours; it is not remembered."""
        return self._timed(self._evaluation.of_others or self._evaluation.public)

    def any_tokens_of_others(self) -> float:
        """Measure their loss on tokens in any order; 0 if nothing can."""
        measure = self._evaluation.of_any_tokens
        return 0.0 if measure is None else self._timed(measure)

    def _timed(self, measure: Callable[[], float]) -> float:
        began = time.monotonic()
        loss = measure()
        self.seconds += self._time.counted(time.monotonic() - began)
        return loss

    def public_of_copy(self, values: torch.Tensor) -> float:
        """Measure the public loss of a copy of parameters, on any thread: training goes on.

        If the device has no memory for a second set of parameters, it is the loss measured last.

        Args:
            values: (num_params,) float32, CPU; nobody may change them meanwhile.

        Raises:
            PeerError: there is no memory, and nothing was measured yet (NOT_READY).
        """
        try:
            if self._evaluation.of_copy is not None:
                return self._evaluation.of_copy(values)
        except (RuntimeError, MemoryError, LocalError) as e:
            if not (isinstance(e, LocalError) or out_of_memory(e)):
                raise
        if self.public is None:
            raise PeerError(Reason.NOT_READY, "the loss of the parameters was not measured yet")
        return self.public

    def fresh_public(self, counters: Counters) -> float:
        """The public loss of the present parameters, measured if need be."""
        if self.public is None or self.age(counters) > 0:
            self.take(counters)
        return math.nan if self.public is None else self.public

    def age(self, counters: Counters) -> float:
        """Age of the last measurement: windows of steps, plus cycles of merges, since then."""
        steps = (counters.step - self._step) / self._rules.window_steps
        return steps + (counters.merges - self._merges) / self._rules.fragments


def spread(records: Records, at_most: int) -> torch.Tensor:
    """Return at most so many records, evenly spread."""
    if len(records) <= at_most:
        return records[:]
    return records[torch.linspace(0, len(records) - 1, at_most).long()]


def require_finite(loss: float | None, counters: Counters) -> None:
    """Stop a run that has diverged.

    Raises:
        DivergedError: the loss is not finite.
    """
    if loss is not None and not math.isfinite(loss):
        raise DivergedError(
            f"training diverged: the loss at step {counters.step} is {loss}",
            "restart from an older checkpoint; lower optimiser.learning_rate in a new swarm",
        )
