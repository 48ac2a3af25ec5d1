"""The trainer process of a benchmark's daemon: the real one, but for what a step computes.

A step takes its time asleep, so that it holds no core, as if an accelerator computed it. It moves a
few parameters at random, so that peers differ, and leaves no gradient, so that AdamW does nothing.
Losses are not measured. Snapshots, codec, merges, ledger, checkpoints and all threads are real.
"""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Final

import torch

from benchmarks.overlap.timeline import Row
from xpeer.accounts.budget import Charged
from xpeer.privacy.mechanism import Mechanism
from xpeer.privacy.steps import StepResult
from xpeer.status import PrivacySpent
from xpeer.trainer import build as production
from xpeer.trainer.assembled import Assembled
from xpeer.trainer.main import main
from xpeer.trainer.setup import TrainerSetup
from xpeer.training.loop import TrainingLoop
from xpeer.training.measuring import Evaluation, Measurements
from xpeer.update import PrivateUpdate, RawUpdate

STEP_VARIABLE: Final = "OVERLAP_STEP_S"
TIMELINE: Final = "timeline.jsonl"
MOVED: Final = 1 << 17
"""Parameters that a step changes; half a millisecond of a core."""


class SleepingMechanism:
    """A mechanism whose steps are emulated; the rest is the manifest's own.

    Args:
        real: certifies snapshots and answers for the ledger.
        trainer: whose parameters a step moves, and whose counters it writes down.
        step_s: how long a step takes.
        timeline: a row is appended before every step.
    """

    def __init__(
        self, real: Mechanism, trainer: TrainingLoop, step_s: float, timeline: Path
    ) -> None:
        self.engine, self.notes = "asleep", real.notes
        self._real = real
        self._trainer = trainer
        self._step_s = step_s
        self._file = timeline.open("a", buffering=1)
        self._start = self._used = 0
        self._compute_s = self._core_s = 0.0

    @property
    def seen(self) -> torch.Tensor:
        """See `Mechanism`."""
        return self._real.seen

    def charge_until(self, steps: int) -> int:
        """See `Mechanism`."""
        return self._real.charge_until(steps)

    def charge_ahead(self, steps: int) -> None:
        """See `Mechanism`."""
        self._real.charge_ahead(steps)

    def charged(self) -> Charged:
        """See `Mechanism`; steps are this class's, and each is asked for."""
        return self._real.charged()._replace(used=self._used, left=0)

    def step_gradient(self) -> StepResult:
        """Take the step's time, and no gradient."""
        self._used += 1
        began, core = time.perf_counter(), time.thread_time()
        self._write_row()
        largest = max(self._trainer.parameters.parameters(), key=torch.Tensor.numel).data.view(-1)
        values = largest[self._start : self._start + MOVED]
        values.add_(torch.randn_like(values), alpha=1e-3)
        self._start = (self._start + MOVED) % max(1, largest.numel() - MOVED)
        time.sleep(max(0.0, self._step_s - (time.perf_counter() - began)))
        self._compute_s += time.perf_counter() - began
        self._core_s += time.thread_time() - core
        return StepResult(loss=1.0, records=1, tokens=1)

    def stamp(self, raw: RawUpdate) -> PrivateUpdate:
        """See `Mechanism`."""
        return self._real.stamp(raw)

    def spent(self) -> PrivacySpent:
        """See `Mechanism`."""
        return self._real.spent()

    def close(self) -> None:
        """See `Mechanism`."""
        self._real.close()
        self._file.close()

    def _write_row(self) -> None:
        progress = self._trainer.progress()
        row = Row(
            at=time.time(),
            step=progress.step,
            compute=self._compute_s,
            snapshot=progress.seconds_snapshot,
            merge=progress.seconds_merge,
            blocked=progress.seconds_blocked,
            boundary=progress.seconds_boundary,
            core=time.thread_time() - self._core_s,
            merges=progress.merges,
            steps_late=progress.steps_late,
        )
        self._file.write(json.dumps(asdict(row)) + "\n")


def assemble(setup: TrainerSetup) -> Assembled:
    """The production's trainer, with emulated steps."""
    assembled = production.assemble(setup)
    trainer, step_s = assembled.trainer, float(os.environ[STEP_VARIABLE])
    timeline = Path(setup.home) / TIMELINE
    mechanism = SleepingMechanism(assembled.mechanism, trainer, step_s, timeline)
    assembled.mechanism = trainer.learner.mechanism = mechanism
    trainer.measurements = Measurements(Evaluation(lambda: 1.0), trainer.manifest.round)
    threading.current_thread().name = "trainer"
    return assembled


if __name__ == "__main__":
    main(assemble)
