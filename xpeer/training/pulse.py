"""Signs of life of the trainer process, and a way to end a long step early."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

NEVER = float("inf")


class StepAbandonedError(Exception):
    """The running step was abandoned: it is charged, but does not change the parameters."""


class Pulse:
    """Counts work as it gets done, on any thread, so that others can tell slow from stuck.

    Attributes:
        work: grows with every micro-batch, measured batch and piece of a file.
        written: bytes done of the file that is being written, or was written last.
        total: bytes of that file in all; 0 until one is written.
    """

    def __init__(self) -> None:
        self.work = 0
        self._by_thread: Counter[str] = Counter()
        """Of each thread, by its name, how much it has done of `work`."""
        self.written = self.total = 0
        self._abandon_at = NEVER
        """When a running step is abandoned, monotonic s."""

    def beat(self) -> None:
        """Count a piece of work."""
        self.work += 1
        self._by_thread[threading.current_thread().name] += 1

    def done_by(self, pool: str) -> int:
        """How much the threads of this pool have done of `work`, see `trainer.threads`."""
        counts = dict(self._by_thread).items()
        return sum(count for name, count in counts if name.startswith(f"{pool}_"))

    def micro_batch(self) -> None:
        """Count a micro-batch, between two parts of a step.

        Raises:
            StepAbandonedError: the step has to end now.
        """
        self.beat()
        if self.late:
            raise StepAbandonedError

    @property
    def late(self) -> bool:
        """Whether a running step has to end."""
        return time.monotonic() >= self._abandon_at

    def before(self, work: Callable[P, R]) -> Callable[P, R]:
        """Wrap a function so that each call counts as a micro-batch."""

        def counted(*args: P.args, **kwargs: P.kwargs) -> R:
            self.micro_batch()
            return work(*args, **kwargs)

        return counted

    def wrote(self, written: int, total: int) -> None:
        """Count a piece of a file; progress in bytes, as for `tensor_file.OnProgress`."""
        self.beat()
        self.written, self.total = written, total

    def end_step_within(self, seconds: float) -> None:
        """Let the running step end by itself within this time; abandon it, or a later one, then."""
        self._abandon_at = time.monotonic() + seconds
