"""D36: while joiners of SmolLM2 came, the donor's training thread measured a loss for each: 98 of
160 s without training.

What it may do for a joiner is a copy at a step boundary. The copy is measured beside it, so
that the loss that is offered is that of what is given. No timings: evaluations and threads are
counted.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tests.unit.training.homes import make_homes
from xpeer.forms import Form
from xpeer.mixing.received import ReceivedFragment
from xpeer.trainer import build as assembling
from xpeer.trainer import evaluating
from xpeer.trainer import worker as working
from xpeer.trainer.answers import Losses, Progressed, Reply, StateExported
from xpeer.trainer.arena import Arena, Layout
from xpeer.trainer.commands import NOBODY, Evaluate, ExportState, Request
from xpeer.trainer.server import Server, serve
from xpeer.trainer.threads import Threads
from xpeer.trainer.worker import Worker
from xpeer.training.loop import TrainingLoop
from xpeer.wire import codec

JOINERS = 4
TRAINING = "training of the test"
ANSWER_S = 60.0
"""Only so that a test that fails ends."""
LONG = ("end.steps=1000000", "round.window_steps=100000")
"""No window ends: nothing is measured but for whoever asks."""


class Daemon:
    """The other end of a trainer that trains on a thread of this process."""

    def __init__(self, trainer: TrainingLoop) -> None:
        self._trainer = trainer
        self._told: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._number = 0
        self.server: Server

    def send(self, message: Any) -> None:
        """What the trainer says."""
        self._told.put(message)

    def ask(self, command: Any) -> Any:
        self._number += 1
        self.server.handle(Request(self._number, command))
        while True:
            message = self._told.get(timeout=ANSWER_S)
            if isinstance(message, Reply) and message.number == self._number:
                return message.result

    def values(self) -> torch.Tensor:
        """A copy of the trained parameters in the region."""
        worker = self.server.worker
        return worker._state("float32")[0].clone()

    def more_steps(self, count: int) -> None:
        """Wait until so many more were taken."""
        wanted = self._trainer.counters.step + count
        while True:
            message = self._told.get(timeout=ANSWER_S)
            if isinstance(message, Progressed) and message.progress.step >= wanted:
                return


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, bool]]:
    """Evaluations and passes over whole models: how many, and whether on the training thread."""
    found: Counter[tuple[str, bool]] = Counter()

    def counted(module: Any, name: str) -> None:
        real = getattr(module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            found[name, threading.current_thread().name == TRAINING] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    counted(evaluating, "evaluate")
    counted(working, "narrow")
    return found


@contextmanager
def training(folder: Path, *changes: str) -> Iterator[tuple[TrainingLoop, Daemon]]:
    """A trainer in the middle of its run, and who may ask it."""
    torch.set_num_threads(1)
    node = assembling.assemble(make_homes(folder, 1, changes=(*LONG, *changes))[0])
    trainer, arena = node.trainer, Arena.create(Layout.of(node.trainer.manifest))
    daemon = Daemon(trainer)
    daemon.server = serve(daemon.send, arena, node, 3600.0)
    thread = threading.Thread(target=trainer.run, name=TRAINING)
    thread.start()
    try:
        yield trainer, daemon
    finally:
        trainer.stop()
        thread.join()
        daemon.server._threads.close()
        node.close()
        arena.close()


class MergeAll:
    """A command: as after a merge of each fragment. What joiners get is an average with these."""

    on = "training"

    def apply(self, trainer: Worker) -> None:
        exchanges = trainer.exchanges
        for fragment in range(exchanges.fragments.num_fragments):
            size = exchanges.fragments.size(fragment)
            values = trainer.loop.parameters.gather(fragment, torch.empty(size))
            kept = torch.frombuffer(bytearray(codec.encode("int8", values)), dtype=torch.uint8)
            exchanges.consolidation.merged(
                fragment, ReceivedFragment(Form("int8", len(values)), kept)
            )


COPIES = ("narrow", False)
MASKS = ("round.masks=true", "round.group=3")


@pytest.mark.parametrize("changes", [(), MASKS], ids=["no masks", "masks"])
@pytest.mark.parametrize("before", ["nothing", "a measurement", "meetings"])
def test_joiners_one_after_another_cost_the_training_thread_no_evaluation(
    tmp_path: Path, calls: Counter[tuple[str, bool]], changes: tuple[str, ...], before: str
) -> None:
    given, losses = list[torch.Tensor](), list[float]()
    with training(tmp_path, *changes) as (trainer, daemon):
        daemon.more_steps(1)
        if before == "a measurement":
            assert isinstance(daemon.ask(Evaluate()), Losses)
        if before == "meetings":
            trainer.submit(Request(NOBODY, cast(Any, MergeAll())))
        calls.clear()
        steps = []
        for _ in range(JOINERS):
            daemon.more_steps(3)
            exported = daemon.ask(ExportState())
            assert isinstance(exported, StateExported), exported
            assert 0.0 < exported.core_s < ANSWER_S
            steps.append(exported.step)
            losses.append(exported.loss_public)
            given.append(daemon.values())
        for_joiners = dict(calls)
    assert set(for_joiners) == {("evaluate", False), COPIES}
    assert for_joiners[COPIES] == JOINERS
    assert steps == sorted(set(steps))  # each was given what had been trained by then
    for values, loss in zip(given, losses, strict=True):
        with trainer.parameters.with_values(values):
            assert trainer.measurements.public_of_others() == pytest.approx(loss, rel=0.05)


def test_a_copy_is_measured_on_one_core(tmp_path: Path) -> None:
    """Training has the others, however many it uses."""
    torch.set_num_threads(2)
    threads = Threads()
    found = [threads.wait_for(pool, torch.get_num_threads) for pool in ("measuring", "disk")]
    assert (found, torch.get_num_threads()) == ([1, 2], 2)
    threads.close()
    torch.set_num_threads(1)
