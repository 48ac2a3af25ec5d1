"""Four members of one swarm on this machine, founded, invited and asked by the command line."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.hostile.attacks import ATTACK_VARIABLE, LATE
from benchmarks.simulator import corpora
from xpeer.cli.demo.daemons import call, status_of
from xpeer.config import Home
from xpeer.status import Status

_ROOT = Path(__file__).parents[2]
_LISTEN = "/ip4/127.0.0.1/tcp/0"
_START_TIMEOUT_S, _END_TIMEOUT_S, _POLL_S = 240.0, 40.0, 0.5
NAMES = ("anna", "bert", "cleo", "dora")
HOSTILE = NAMES[3]


@dataclass
class Seen:
    """What one member did."""

    steps: int = 0
    seconds: float = 0.0
    """From the first step seen to the last."""
    loss: float | None = None
    """On the public text, when its own steps had ended."""
    exchanges: dict[str, int] = field(default_factory=dict)
    """Done until then, by partner."""
    failed: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    merges: int = 0
    clipped: int = 0
    merges_at_the_end: int = 0
    """The closing consolidation included."""
    clipped_at_the_end: int = 0
    distance: float | None = None
    steps_late: float = 0.0
    """From the snapshot to the merge, on average."""
    avoided: dict[str, str] = field(default_factory=dict)
    """Partners that were left alone at some time: why."""


class Peers:
    """Their homes and processes.

    Args:
        folder: everything of them.
        steps: of the run.
        changes: of the manifest, as `xpeer init --set` takes them.
    """

    def __init__(self, folder: Path, steps: int, changes: Sequence[str] = ()) -> None:
        self._folder, self._steps = folder, steps
        self._changes = [f"--set={change}" for change in changes]
        self.homes = {name: Home(folder / name) for name in NAMES}
        self.ids: dict[str, str] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._joins_at = 0
        self._join: Callable[[], None] | None = None

    def prepare(self) -> None:
        """Texts, homes, invitations."""
        for name, corpus in zip(NAMES, corpora.collect(len(NAMES)), strict=True):
            text = bytes(corpus.train.numpy()[:600_000]).decode(errors="replace")
            (self._folder / f"{name}.txt").write_text(text, encoding="utf-8")
        founder, *joiners = NAMES
        fields = [f"--set=end.steps={self._steps}", "--set=optimiser.learning_rate=0.004",
                  "--set=optimiser.warmup_steps=30"]  # fmt: skip
        call(["init", *self._place(founder), "--swarm", "hostile", "--privacy", "off",
              "--preset", "tiny", *fields, *self._changes])  # fmt: skip
        self.ids[founder] = call(["id", "--home", str(self.homes[founder].path)])
        for name in joiners:
            self.ids[name] = call(["id", "--home", str(self.homes[name].path)])

    def _place(self, name: str) -> list[str]:
        shard = str(self._folder / f"{name}.txt")
        return ["--home", str(self.homes[name].path), "--shard", shard, "--listen", _LISTEN]

    @contextlib.contextmanager
    def running(
        self, attack: str = "", throttles: Sequence[float] = (1, 1, 1, 1), joins_at: int = 0
    ) -> Iterator[None]:
        """All daemons; the last one is hostile if an attack is named, and joins once the founder
        is at this step.
        """
        self._joins_at = joins_at
        try:
            shares = dict(zip(NAMES, throttles, strict=True))
            founder, *joiners = NAMES
            does = {name: attack if name == HOSTILE or attack == LATE else "" for name in NAMES}
            self._start(founder, does[founder], shares[founder])
            status = self._wait(founder)
            for name in joiners:
                token = call(["invite", "create", "--home", str(self.homes[founder].path), "--for",
                              self.ids[name], "--seed", status.addresses[0]])  # fmt: skip
                call(["init", *self._place(name), "--join", token])
                start = partial(self._start, name, does[name], shares[name])
                if joins_at and name == HOSTILE:
                    self._join = start
                else:
                    start()
            yield
        finally:
            for process in self._processes.values():
                process.send_signal(signal.SIGTERM)
            for process in self._processes.values():
                try:
                    process.wait(_END_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def _start(self, name: str, attack: str, throttle: float) -> None:
        kept = {key: value for key, value in os.environ.items() if not key.startswith("XPEER_")}
        path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        own = {
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "XPEER_TRAINING_THREADS": "1",
            "XPEER_TRAINING_MIN_PEERS": str(len(NAMES) - (2 if self._joins_at else 1)),
            "XPEER_TRAINING_THROTTLE": str(throttle),
            "XPEER_PRIVACY_REGISTER": str(self._folder / f"register-{name}"),
            ATTACK_VARIABLE: attack,
        }
        home = str(self.homes[name].path)
        module = (
            ["benchmarks.hostile.daemon", home]
            if attack
            else ["xpeer.cli", "start", "--home", home]
        )
        with (self._folder / f"{name}.log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", *module],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                env={**kept, **own},
            )  # fmt: skip

    def _wait(self, name: str) -> Status:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while (status := status_of(self.homes[name])) is None or not status.addresses:
            self._require_alive(name, deadline)
        return status

    def _require_alive(self, name: str, deadline: float) -> None:
        if self._processes[name].poll() is not None or time.monotonic() > deadline:
            log = (self._folder / f"{name}.log").read_text(errors="replace")[-3000:]
            raise RuntimeError(f"{name} died or takes too long; its log ends:\n{log}")
        time.sleep(_POLL_S)

    def watch(self, names: Sequence[str], timeout_s: float) -> dict[str, Seen]:
        """Until these have taken all steps and closed among themselves; what each did."""
        seen = {name: Seen() for name in names}
        began: dict[str, float] = {}
        ended: dict[str, float] = {}
        deadline = time.monotonic() + timeout_s
        closed: set[str] = set()
        while len(closed) < len(names) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
            for name in names:
                if name not in self._processes:
                    continue
                status = status_of(self.homes[name])
                if status is None:
                    self._require_alive(name, deadline)
                    continue
                self._note(name, status, seen[name], began, ended)
                if self._join is not None and status.progress.step >= self._joins_at:
                    self._join()
                    self._join = None
                closing_s = time.monotonic() - ended.get(name, time.monotonic())
                if status.state == "finished" or closing_s > 60.0:
                    closed.add(name)
        return seen

    def _note(
        self,
        name: str,
        status: Status,
        found: Seen,
        began: dict[str, float],
        ended: dict[str, float],
    ) -> None:
        now, progress = time.monotonic(), status.progress
        if progress.step > 0:
            began.setdefault(name, now)
        found.avoided.update(
            {self._name(p.peer_id): p.avoided_why for p in status.partners if p.avoided_s > 0}
        )
        found.merges_at_the_end, found.clipped_at_the_end = progress.merges, progress.merges_clipped
        if name in ended:
            return
        found.steps, found.seconds = progress.step, now - began.get(name, now)
        found.loss, found.distance = progress.loss_public, progress.consensus_distance
        found.exchanges = {self._name(p.peer_id): p.exchanges for p in status.partners}
        found.failed, found.skipped = status.exchanges_failed, status.exchanges_skipped
        found.merges, found.clipped = progress.merges, progress.merges_clipped
        found.steps_late = progress.steps_late
        if progress.step >= self._steps:
            ended[name] = now

    def _name(self, peer_id: str) -> str:
        return next((name for name, known in self.ids.items() if known == peer_id), peer_id)


def figures(seen: dict[str, Seen]) -> dict[str, Any]:
    """What the honest ones did, in numbers."""
    losses = [found.loss for found in seen.values() if found.loss is not None]
    merges = sum(found.merges_at_the_end for found in seen.values())
    honest = sum(sum(n for who, n in f.exchanges.items() if who in seen) for f in seen.values())
    everybody = sum(sum(found.exchanges.values()) for found in seen.values())
    seconds = sum(found.seconds for found in seen.values())
    return {
        "public_loss": round(sum(losses) / max(1, len(losses)), 3),
        "worst_public_loss": round(max(losses, default=float("nan")), 3),
        "clip_rate": round(sum(f.clipped_at_the_end for f in seen.values()) / max(1, merges), 4),
        "exchanges_per_s": round(everybody / max(1.0, seconds), 4),
        "honest_exchanges_per_s": round(honest / max(1.0, seconds), 4),
        "steps_late": round(sum(found.steps_late for found in seen.values()) / len(seen), 2),
        "steps": min(found.steps for found in seen.values()),
    }
