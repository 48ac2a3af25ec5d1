"""Four members of one swarm on this machine, founded, invited and asked by the command line."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.daemons import Daemon, ending
from benchmarks.hostile.attacks import ATTACK_VARIABLE, LATE
from benchmarks.simulator import corpora
from xpeer.cli.demo.daemons import call
from xpeer.status import Status

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
        self.daemons = {name: Daemon(folder, name) for name in NAMES}
        self.ids: dict[str, str] = {}
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
        for name in (founder, *joiners):
            self.ids[name] = call(["id", *self._home(name)])

    def _home(self, name: str) -> list[str]:
        return ["--home", str(self.daemons[name].home.path)]

    def _place(self, name: str) -> list[str]:
        shard = str(self._folder / f"{name}.txt")
        return [*self._home(name), "--shard", shard, "--listen", _LISTEN]

    @contextlib.contextmanager
    def running(
        self, attack: str = "", throttles: Sequence[float] = (1, 1, 1, 1), joins_at: int = 0
    ) -> Iterator[None]:
        """All daemons; the last one is hostile if an attack is named, and joins once the founder
        is at this step.
        """
        self._joins_at = joins_at
        shares = dict(zip(NAMES, throttles, strict=True))
        founder, *joiners = NAMES
        does = {name: attack if name == HOSTILE or attack == LATE else "" for name in NAMES}
        with ending(self.daemons.values(), _END_TIMEOUT_S):
            self._start(founder, does[founder], shares[founder])
            status = self.daemons[founder].wait(lambda s: bool(s.addresses), _START_TIMEOUT_S)
            for name in joiners:
                token = call(["invite", "create", *self._home(founder), "--for", self.ids[name],
                              "--seed", status.addresses[0]])  # fmt: skip
                call(["init", *self._place(name), "--join", token])
                start = partial(self._start, name, does[name], shares[name])
                if joins_at and name == HOSTILE:
                    self._join = start
                else:
                    start()
            yield

    def _start(self, name: str, attack: str, throttle: float) -> None:
        home = str(self.daemons[name].home.path)
        module = (
            ["benchmarks.hostile.daemon", home]
            if attack
            else ["xpeer.cli", "start", "--home", home]
        )
        settings = {
            "XPEER_TRAINING_MIN_PEERS": str(len(NAMES) - (2 if self._joins_at else 1)),
            "XPEER_TRAINING_THROTTLE": str(throttle),
            ATTACK_VARIABLE: attack,
        }
        self.daemons[name].start(module, settings)

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
                if not self.daemons[name].started:
                    continue
                status = self.daemons[name].status()
                if status is None:
                    self.daemons[name].require_alive(deadline)
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
