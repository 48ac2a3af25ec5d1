"""A swarm of two real daemons, which train, exchange and measure losses when they are asked to."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.trainer import memory
from benchmarks.trainer.case import RANK, WINDOW, Case, write_texts
from xpeer.cli.demo.daemons import Daemons, call, status_of
from xpeer.config import Home
from xpeer.status import Status

_NAMES = ("anna", "bert")
_LISTEN = "/ip4/127.0.0.1/tcp/0"
_START_TIMEOUT_S, _STEP_TIMEOUT_S, _POLL_S = 600.0, 600.0, 0.1
COPIES = 12
"""Bytes of a trained parameter that are kept for checkpoints. They are not measured here: a test
compares them with what a trainer keeps."""
_QUIET_S = 0.5
"""A process that computes nothing for so long rests."""


@dataclass(frozen=True)
class Work:
    """What the two trainers did together in a turn."""

    tokens: int
    seconds: float
    """That their processes computed; on a GPU, of the clock."""
    exchanges: int


@dataclass(frozen=True)
class Memory:
    """Of one trainer, in bytes."""

    alone: int
    """The most while it trained without a partner, after its first checkpoint; on a CPU."""
    peak: int
    """The same with a partner, after another checkpoint."""
    saving: int
    """The most while it saved that one."""
    num_params: int
    """That are trained."""

    @property
    def exchange(self) -> int:
        """What it needs since it has a partner: shared with the daemon, in flight, and kept."""
        return max(0, self.peak - self.alone)

    @property
    def copies(self) -> int:
        """What it copied values and moments to for a checkpoint, and keeps for the next one."""
        return COPIES * self.num_params

    @property
    def own(self) -> int:
        """What a loop without partners and checkpoints needs as well."""
        return self.alone - self.copies


class Pair:
    """Two members in turn at work and at rest. They rest until `work` is called.

    Args:
        homes: of both.
        alone: memory of the first one before the second one came.
        on_gpu: whether the clock counts, not the processes' seconds.
    """

    def __init__(self, homes: list[Home], alone: int, *, on_gpu: bool) -> None:
        self._homes, self._alone, self._on_gpu = homes, alone, on_gpu
        self._trainers = [_trainer_of(_status(home).pid) for home in homes]
        self._saving = 0

    def work(self, steps: int) -> Work:
        """Let both take at least so many steps, and rest again."""
        before = [_status(home) for home in self._homes]
        began = self._seconds()
        self._all("resume")
        for home, then in zip(self._homes, before, strict=True):
            _wait(home, lambda now, s=then: now.progress.step >= s.progress.step + steps)  # type: ignore[misc]
        self.rest()
        after = [_status(home) for home in self._homes]
        return Work(
            sum(b.progress.tokens - a.progress.tokens for a, b in zip(before, after, strict=True)),
            self._seconds() - began,
            sum(b.exchanges_done - a.exchanges_done for a, b in zip(before, after, strict=True)),
        )

    def rest(self) -> None:
        """Pause both, and wait until neither computes."""
        self._all("pause")
        for home, trainer in zip(self._homes, self._trainers, strict=True):
            _wait(home, lambda now: now.state == "paused")
            _wait_until_quiet(trainer)

    def save(self) -> None:
        """Have the first one's trainer save a checkpoint. What it trains after that counts for its
        memory.
        """
        pid = self._trainers[0].pid
        memory.begin_anew(pid)
        call(["checkpoint", "save", "--home", str(self._homes[0].path)])
        _wait_until_quiet(self._trainers[0])
        self._saving = memory.largest(pid)
        memory.begin_anew(pid)

    def memory(self) -> Memory:
        """Of the first one's trainer, since `save`."""
        pid, params = self._trainers[0].pid, _status(self._homes[0]).num_params
        return Memory(self._alone, memory.largest(pid), self._saving, params)

    def _seconds(self) -> float:
        if self._on_gpu:
            return time.perf_counter()
        return sum(sum(trainer.cpu_times()[:2]) for trainer in self._trainers)

    def _all(self, command: str) -> None:
        for home in self._homes:
            call([command, "--home", str(home.path)])


def _status(home: Home) -> Status:
    status = status_of(home)
    if status is None:
        raise RuntimeError(f"the daemon of {home.path} does not answer")
    return status


def _wait(home: Home, reached: Callable[[Status], bool]) -> None:
    deadline = time.monotonic() + _STEP_TIMEOUT_S
    while not reached(_status(home)):
        if time.monotonic() > deadline:
            raise RuntimeError(f"{home.path} got stuck in {_status(home).state}")
        time.sleep(_POLL_S)


@contextmanager
def running(folder: Path, case: Case) -> Iterator[Pair]:
    """Found a swarm of two by the command line, and end it afterwards."""
    shard, public = write_texts(folder)
    homes = [Home(folder / name) for name in _NAMES]
    places = [
        ["--home", str(home.path), "--shard", str(shard), "--listen", _LISTEN,
         *(["--tokenizer", str(case.model)] if case.model else [])]
        for home in homes
    ]  # fmt: skip
    call([
        "init", *places[0], "--swarm", "benchmark", "--privacy", case.mode, "--skip-trial",
        *(["--model", str(case.model)] if case.model else ["--preset", "small"]),
        *(["--lora-rank", str(RANK)] if case.kind == "lora" else []),
        "--public-text", str(public), *(f"--set={change}" for change in case.changes),
    ])  # fmt: skip
    with Daemons(folder / "logs").running() as daemons:
        _start(daemons, homes[0], case)
        _wait_for(daemons, homes[0], lambda status: status.last_checkpoint_age_s is not None)
        alone = _memory_alone(homes[0])
        peer = call(["id", "--home", str(homes[1].path)])
        seed = _wait_for(daemons, homes[0], lambda status: bool(status.addresses)).addresses[0]
        token = call(
            ["invite", "create", "--home", str(homes[0].path), "--for", peer, "--seed", seed]
        )
        base = ["--base-model", str(case.model or homes[0].initial_model)]
        base = base if case.kind == "lora" else []
        call(["init", *places[1], *base, "--join", token])
        _start(daemons, homes[1], case)
        for home in homes:
            _wait_for(daemons, home, lambda status: status.progress.step > 0)
        found = Pair(homes, alone, on_gpu="cuda" in _wait_for(daemons, homes[0], bool).device)
        found.rest()
        yield found


def _memory_alone(home: Home) -> int:
    """The most that a trainer without partners has while it takes some steps."""
    trainer = _trainer_of(_status(home).pid)
    memory.begin_anew(trainer.pid)
    step = _status(home).progress.step
    _wait(home, lambda now: now.progress.step >= step + 2 * WINDOW)
    return memory.largest(trainer.pid)


def _start(daemons: Daemons, home: Home, case: Case) -> None:
    settings = {
        "XPEER_TRAINING_MIN_PEERS": "0",
        "XPEER_TRAINING_THREADS": "1",
        "XPEER_TRAINING_DEVICE": case.device,
        **({"XPEER_TRAINING_MICRO_BATCH": str(case.pass_records)} if case.model else {}),
        "XPEER_CHECKPOINT_EVERY_S": "1000000",
    }
    daemons.start(home.path.name, ["start", "--home", str(home.path)], settings)


def _wait_for(daemons: Daemons, home: Home, reached: Callable[[Status], bool]) -> Status:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while (status := status_of(home)) is None or not reached(status):
        daemons.check_alive()
        if time.monotonic() > deadline:
            raise RuntimeError(f"{home.path} takes too long: {status and status.state}")
        time.sleep(_POLL_S)
    return status


def _trainer_of(daemon: int) -> psutil.Process:
    children = psutil.Process(daemon).children()
    return next(child for child in children if "xpeer.trainer.main" in child.cmdline())


def _wait_until_quiet(process: psutil.Process) -> None:
    """Until it computes nothing but its beats."""
    while True:
        before = sum(process.cpu_times()[:2])
        time.sleep(_QUIET_S)
        if sum(process.cpu_times()[:2]) - before < 0.05 * _QUIET_S:
            return
