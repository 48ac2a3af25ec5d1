"""The demo's daemons and commands without processes: a swarm that takes no step.

Commands run here and now. Nodes only move their parameters, the further the higher their rate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from tests.cases.support import skipping
from tests.fake_daemon import HEALTHY
from xpeer.cli import main
from xpeer.cli.demo import daemons
from xpeer.config import Home
from xpeer.manifest.signed import SignedManifest
from xpeer.phase import Phase
from xpeer.status import Status
from xpeer.training import checkpoint
from xpeer.training.flat import read_flat
from xpeer.training.initial import model_of

SEED = "/ip4/127.0.0.1/tcp/1/p2p/12D3KooWFPJP3pdGWNPBFnPvKqQT8KZywcEnKw823rkyGk1DESt7"
STEPS = 6


class FakeDaemons:
    """Nodes that "train" by moving their parameters, the further the higher their rate."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self.started: dict[str, tuple[list[str], dict[str, str]]] = {}

    @contextmanager
    def running(self) -> Iterator[FakeDaemons]:
        yield self

    def start(self, name: str, arguments: Sequence[str], settings: Mapping[str, str]) -> None:
        self.started[name] = list(arguments), dict(settings)
        if arguments[0] == "start":
            self._save(Home(Path(arguments[2])))

    def _save(self, home: Home) -> None:
        founder = home if home.manifest.exists() else Home(home.path.parent / "python")
        manifest = SignedManifest.load(founder.manifest).open()
        flat = read_flat(model_of(manifest, founder, fresh=True))
        home.checkpoints.mkdir(parents=True, exist_ok=True)
        moved = flat + 1000 * manifest.optimiser.learning_rate
        for step in (2, STEPS):
            bundle = checkpoint.Bundle(moved, moved * 0, moved * 0, step, counters={"step": step})
            checkpoint.save(home.checkpoints, bundle, keep=9)

    def check_alive(self) -> None:
        """They never fail."""

    def end(self, names: Sequence[str]) -> None:
        """They end by themselves."""

    def log(self, name: str) -> Path:
        return self._logs / name


def finished(_: Home) -> Status:
    progress = msgspec.structs.replace(HEALTHY.progress, step=STEPS)
    return msgspec.structs.replace(HEALTHY, state=Phase.FINISHED, progress=progress)


class Calls:
    """Commands, run here and now."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[list[str]] = []
        self._monkeypatch = monkeypatch

    def __call__(self, arguments: Sequence[str], settings: Mapping[str, str] | None = None) -> str:
        words = [*arguments, *(skipping() if arguments[0] == "init" else ())]
        self.made.append(words)
        with self._monkeypatch.context() as patch:
            for key, value in (settings or {}).items():
                patch.setenv(key, value)
            done = CliRunner().invoke(main, words, prog_name="xpeer")
        assert done.exit_code == 0, done.output
        return done.stdout.strip()

    def inits(self) -> list[list[str]]:
        return [words for words in self.made if words[0] == "init"]


def install(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Have the demo use these; returns the commands that it gives."""
    calls = Calls(monkeypatch)
    monkeypatch.setattr(daemons, "Daemons", FakeDaemons)
    monkeypatch.setattr(daemons, "call", calls)
    monkeypatch.setattr(daemons, "status_of", finished)
    monkeypatch.setattr(daemons, "first_address", lambda *_: SEED)
    return calls
