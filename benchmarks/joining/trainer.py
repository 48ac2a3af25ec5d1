"""The trainer process of a benchmark's daemon: the real one, that writes down what it has used.

A row is written before every step. Copies for joiners are timed on the threads that make them.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.joining.figures import TIMELINE, Row
from xpeer.privacy.steps import StepResult
from xpeer.trainer import build as production
from xpeer.trainer.assembled import Assembled
from xpeer.trainer.main import main
from xpeer.trainer.setup import TrainerSetup
from xpeer.trainer.worker import Worker
from xpeer.training.loop import TrainingLoop
from xpeer.update import Checked, PeerUpdate


class Notes:
    """What the trainer has used since its start.

    Args:
        loop: whose steps and copies are written down.
        path: of the timeline; rows are added.
    """

    def __init__(self, loop: TrainingLoop, path: Path) -> None:
        self._loop = loop
        self._file = path.open("a", buffering=1)
        self._copies = self._waits = 0
        self._copy_s = self._copy_cpu_s = 0.0
        self._distance: float | None = None
        self._verify = loop.exchanges.verify
        loop.exchanges.verify = self.verify  # type: ignore[method-assign]
        self._step_gradient = loop.learner.mechanism.step_gradient
        self._show = loop.show
        loop.learner.mechanism.step_gradient = self.step_gradient  # type: ignore[method-assign]
        loop.show = self.show  # type: ignore[method-assign]
        self._count_the_rest()

    def step_gradient(self) -> StepResult:
        """A step, with a row before it."""
        progress = self._loop.progress()
        row = Row(
            at=time.time(),
            step=progress.step,
            tokens=progress.tokens,
            cpu_s=time.process_time(),
            blocked_s=progress.seconds_blocked,
            copies=self._copies,
            copy_s=self._copy_s,
            copy_cpu_s=self._copy_cpu_s,
            copy_waits=self._waits,
            distance=self._distance,
        )
        self._file.write(json.dumps(asdict(row)) + "\n")
        return self._step_gradient()

    def verify(self, meeting_id: int, exchange_id: int, update: PeerUpdate) -> Checked:
        """An exchange's distance, without those before it."""
        checked = self._verify(meeting_id, exchange_id, update)
        self._distance = checked.distance
        return checked

    def show(self, out: torch.Tensor) -> Callable[[], None]:
        """The part of a copy that the training thread makes."""
        began, core, waits = time.perf_counter(), time.thread_time(), _waits()
        finish = self._show(out)
        self._copies += 1
        self._copy_s += time.perf_counter() - began
        self._copy_cpu_s += time.thread_time() - core
        self._waits += _waits() - waits

        def finish_and_count() -> None:
            core = time.thread_time()
            finish()
            self._copy_cpu_s += time.thread_time() - core

        return finish_and_count

    def _count_the_rest(self) -> None:
        """The measuring thread does the last parts of a copy, on one core."""
        measure_state = Worker.measure_state
        narrow_state = Worker.narrow_state

        def narrow_and_count(trainer: Worker) -> None:
            core = time.thread_time()
            narrow_state(trainer)
            self._copy_cpu_s += time.thread_time() - core

        def measure_and_count(trainer: Worker) -> float:
            core = time.thread_time()
            loss = measure_state(trainer)
            self._copy_cpu_s += time.thread_time() - core
            return loss

        Worker.narrow_state = narrow_and_count  # type: ignore[method-assign, assignment]
        Worker.measure_state = measure_and_count  # type: ignore[method-assign, assignment]


def _waits() -> int:
    """How often this thread let go of its core because it had to wait."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


def assemble(setup: TrainerSetup) -> Assembled:
    """The production's trainer, which writes a timeline."""
    assembled = production.assemble(setup)
    Notes(assembled.trainer, Path(setup.home) / TIMELINE)
    return assembled


if __name__ == "__main__":
    main(assemble)
