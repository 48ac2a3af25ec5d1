"""Signs of life of the trainer process, and how a long step is ended early."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

NEVER = float("inf")


class StepAbandonedError(Exception):
    """The step that ran was given up: it is charged and was not taken."""


class Pulse:
    """Counts what gets done, on any thread; whoever watches it can tell slow from stuck.

    Attributes:
        work: grows with every micro-batch, measured batch and piece of a file.
        written: bytes of the file that is being written.
        total: its size; 0 = none is.
    """

    def __init__(self) -> None:
        self.work = 0
        self.written = self.total = 0
        self._abandon_at = NEVER

    def beat(self) -> None:
        """Something got done."""
        self.work += 1

    def micro_batch(self) -> None:
        """Between two parts of a step.

        Raises:
            StepAbandonedError: the step has to end now.
        """
        self.work += 1
        if self.late:
            raise StepAbandonedError

    @property
    def late(self) -> bool:
        """Whether no step may go on."""
        return time.monotonic() >= self._abandon_at

    def before(self, work: Callable[P, R]) -> Callable[P, R]:
        """The same, counted as a micro-batch."""

        def counted(*args: P.args, **kwargs: P.kwargs) -> R:
            self.micro_batch()
            return work(*args, **kwargs)

        return counted

    def wrote(self, written: int, total: int) -> None:
        """So much of a file is on the disk."""
        self.work += 1
        self.written, self.total = written, total

    def end_step_within(self, seconds: float) -> None:
        """Let the step that runs end by itself if it does so soon; no step begins after it."""
        self._abandon_at = time.monotonic() + seconds
