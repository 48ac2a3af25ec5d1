"""When checkpoints are written while training goes on, and what that costs the loop.

The copy is taken on the loop's thread, at a boundary; it is written on another, one at a time.
One is due every `checkpoint.every_s` seconds, but not so often that the copies take more than 2% of
the time; at the end of a new node's first window; and whenever further private steps may not be
charged without one (`training.charging`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from xpeer.errors import LocalError
from xpeer.training.charging import Begun
from xpeer.training.loop import TrainingLoop

SHARE_SAVING: Final = 0.02
"""Of the loop's time, for copies that are due by the clock."""
AGAIN_S: Final = 10.0
"""After a checkpoint that could not be written."""
logger = logging.getLogger("xpeer.training")

Write = Callable[[], str]
"""Writes a copy that was taken; its path."""


class Saving:
    """Checkpoints of one trainer. `_write` belongs to the disk's thread, the rest to the loop's.

    Args:
        trainer: whose parameters are saved.
        capture: copies everything that a checkpoint holds.
        submit: has something done on the disk's thread.
        saved: called for each checkpoint: its path and step.
        failed: called for each that could not be written: why, and its step.
        every_s: seconds between checkpoints.
        resumed: there is one already.
        clock: seconds.
    """

    def __init__(
        self,
        trainer: TrainingLoop,
        capture: Callable[[], Write],
        submit: Callable[[Callable[[], None]], object],
        saved: Callable[[str, int], None],
        failed: Callable[[str, int], None] = lambda _why, _step: None,
        *,
        every_s: float,
        resumed: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._trainer = trainer
        self._capture = capture
        self._submit = submit
        self._saved, self._failed = saved, failed
        self._every_s = every_s
        self._clock = clock
        self._saved_at = clock()
        self._first_window = None if resumed else trainer.counters.window
        self._running = False
        self._again_at: float | None = None
        self._copy_s = 0.0
        trainer.pacing.permits.save = self.begin

    def copy(self) -> Write:
        """At a boundary: take a copy, to be written on any thread."""
        began = self._clock()
        write = self._capture()
        self._copy_s = self._clock() - began
        self._trainer.timings.saving_s += self._copy_s
        self._trainer.pacing.permits.captured()

        def written() -> str:
            path = ""
            try:
                path = write()
            finally:
                self._trainer.pacing.permits.saved(written=bool(path))
            return path

        return written

    def begin(self) -> Begun:
        """At a boundary: have a checkpoint written, if none is being written."""
        if self._running:
            return "running"
        if self._again_at is not None and self._clock() < self._again_at:
            return "failing"
        self._running, self._first_window = True, None
        write, step = self.copy(), self._trainer.counters.step
        self._submit(lambda: self._write(write, step))
        return "begun"

    def after_step(self) -> None:
        """At a boundary: begin a checkpoint if it is due by the clock, or is the first."""
        waited_s = self._clock() - self._saved_at
        first = self._first_window not in (None, self._trainer.counters.window)
        if first or waited_s >= max(self._every_s, self._copy_s / SHARE_SAVING):
            self.begin()

    def _write(self, write: Write, step: int) -> None:
        again_at: float | None = self._clock() + AGAIN_S
        try:
            path = write()
            again_at = None
            self._saved(path, step)
        except LocalError as e:  # a full disk: training goes on, and the next one may succeed
            logger.warning("no checkpoint was written: %s", e)
            self._failed(str(e), step)
        finally:
            self._again_at, self._saved_at, self._running = again_at, self._clock(), False
