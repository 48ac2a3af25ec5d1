"""When checkpoints are written while training goes on, and what that costs the loop.

The loop's thread copies a checkpoint at a boundary. The disk's thread writes it, one at a time.
A checkpoint is due

- every `checkpoint.every_s` seconds, but not so often that copying takes more than 2% of the time;
- at the end of a new node's first window, before its losses are measured for the first time;
- whenever no further private steps may be charged before one is written (`training.charging`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Final

from xpeer.trainer.answers import SaveFailed
from xpeer.training.charging import Begun
from xpeer.training.loop import TrainingLoop

SHARE_SAVING: Final = 0.02
"""Most of the loop's time that copies due by the clock may take, as a fraction."""
AGAIN_S: Final = 10.0
"""Pause after a checkpoint that could not be written."""
logger = logging.getLogger("xpeer.training")

Write = Callable[[], str]
"""Writes a copy, and returns its path."""


class Saving:
    """Checkpoints of one trainer. `_write` belongs to the disk's thread, the rest to the loop's.

    Args:
        trainer: has the parameters to save.
        capture: copies the content of a checkpoint.
        submit: runs a function on the disk's thread.
        saved: called for each checkpoint with its path and step.
        failed: called for each checkpoint that could not be written.
        every_s: seconds between checkpoints.
        resumed: whether there is a checkpoint already.
        clock: seconds.
    """

    def __init__(
        self,
        trainer: TrainingLoop,
        capture: Callable[[], Write],
        submit: Callable[[Callable[[], None]], object],
        saved: Callable[[str, int], None],
        failed: Callable[[SaveFailed], None] = lambda _report: None,
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
        """When the last attempt to write a checkpoint ended; at first, when this was made."""
        self._first_window = None if resumed else trainer.counters.window
        """A new node's first window; None once a checkpoint was begun, or if there was one."""
        self._running = False
        """True iff a checkpoint is being written."""
        self._idle = threading.Event()
        """Set iff none is being written, once one was."""
        self._again_at: float | None = None
        """When a failed checkpoint may be tried again; None = the last one did not fail."""
        self._copy_s = 0.0
        """Time that the last copy took; 0 until there was one."""
        trainer.pacing.permits.save = self.begin

    def copy(self) -> Write:
        """Copy a checkpoint, at a boundary; returns a function that writes it, on any thread."""
        began = self._clock()
        write = self._capture()
        self._copy_s = self._clock() - began
        self._trainer.timings.saving_s += self._copy_s
        self._trainer.pacing.permits.captured()

        def write_and_note() -> str:
            path = ""
            try:
                path = write()
            finally:
                self._trainer.pacing.permits.saved(written=bool(path))
            return path

        return write_and_note

    def begin(self) -> Begun:
        """Begin a checkpoint, at a boundary, unless one is being written or has just failed."""
        if self._running:
            return "running"
        if self._again_at is not None and self._clock() < self._again_at:
            return "failing"
        self._running, self._first_window = True, None
        self._idle.clear()
        write, step = self.copy(), self._trainer.counters.step
        self._submit(lambda: self._write(write, step))
        return "begun"

    def after_step(self) -> None:
        """Begin a checkpoint, at a boundary, if the clock or the first window says so."""
        waited_s = self._clock() - self._saved_at
        first = self._first_window not in (None, self._trainer.counters.window)
        if first or waited_s >= max(self._every_s, self._copy_s / SHARE_SAVING):
            self.begin()

    def before_measuring(self) -> None:
        """Write a new node's first checkpoint, at the end of its first window, and wait for it.

        Without one, a kill in the measurement would come at every start, and lose the window's
        charges each time. Later checkpoints are not made before the measurement: it may show that
        training has diverged.
        """
        if self._first_window is not None and self.begin() != "failing":
            self._idle.wait()

    def _write(self, write: Write, step: int) -> None:
        again_at: float | None = self._clock() + AGAIN_S
        try:
            path = write()
            again_at = None
            self._saved(path, step)
        except Exception as e:  # noqa: BLE001 - a full disk, or no memory: the next may succeed
            report = SaveFailed.because(e, step)
            logger.warning("no checkpoint was written: %s", report.problem)
            self._failed(report)
        finally:
            self._again_at, self._saved_at = again_at, self._clock()
            self._idle.set()
            self._running = False
