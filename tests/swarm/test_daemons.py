"""Whole daemons as processes: joining, training, losses of the seed and of a peer, the end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.cases.support import xpeer
from xpeer.cli.demo.daemons import Daemons, first_address, status_of
from xpeer.config import Home
from xpeer.status import Status

LOOPBACK = "/ip4/127.0.0.1/tcp/0"
TEXT = "\n\n".join(
    f"Record {n}: the quick brown fox number {n * 7919 % 1000} jumps over dog {n * 104729 % 997}."
    for n in range(400)
)
SMALL = {
    "optimiser.sequence_tokens": 32,
    "optimiser.batch_records": 8,
    "round.slot_s": 0.2,
    "round.window_steps": 5,
    "round.deadline_s": 10,
    "privacy.noise_multiplier": 1.0,  # to calibrate it takes each trainer seconds
}
pytestmark = pytest.mark.timeout(240)


def said(*arguments: str | Path, **settings: str) -> str:
    """What `xpeer ARGUMENTS` printed; it has to succeed."""
    done = xpeer(*arguments, settings=settings)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class Swarm:
    """A founder's home, a bootstrap node, and peers that join with tokens."""

    def __init__(self, root: Path, daemons: Daemons, sockets: Path) -> None:
        self.root, self.daemons = root, daemons
        self.seed = ""
        # A daemon that is killed can't remove its sidecar's sockets.
        self.settings = {"TMPDIR": str(sockets)}

    def home(self, name: str) -> Home:
        return Home(self.root / name)

    def shard(self, name: str) -> str:
        folder = self.root / f"text-{name}"
        folder.mkdir(exist_ok=True)
        for part in range(4):
            text = TEXT.replace("fox", f"{name}-{part}")
            (folder / f"{part}.txt").write_text(text, encoding="utf-8")
        return str(folder)

    def found(self, name: str, *more: str, **fields: object) -> str:
        changes = {**SMALL, **{key.replace("__", "."): value for key, value in fields.items()}}
        options = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
        return said(
            "init", "--home", self.home(name).path, "--swarm", "test", "--preset", "tiny",
            "--shard", self.shard(name), "--listen", LOOPBACK, "--skip-trial", *options, *more,
        )  # fmt: skip

    def register(self, name: str) -> Path:
        """Where this node's charges are counted, unless a test sets another place."""
        return self.daemons.log(name).with_name(f"{name}-register")

    def bootstrap(self, swarm_id: str) -> None:
        home = str(self.root / "bootstrap")
        self.daemons.start(
            "bootstrap",
            ["bootstrap", "--home", home, "--swarm", swarm_id, "--listen", LOOPBACK, "--json"],
            self.settings,
        )
        self.seed = first_address(self.daemons, "bootstrap", 60)

    def start(self, name: str, *arguments: str, **settings: str) -> None:
        fixed = {
            **self.settings, "XPEER_TRAINING_THREADS": "1", "XPEER_CHECKPOINT_EVERY_S": "2",
        }  # fmt: skip
        self.daemons.forget(name)
        self.daemons.start(
            name, ["start", "--home", str(self.home(name).path), *arguments], {**fixed, **settings}
        )

    def token_for(self, founder: str, name: str) -> str:
        peer_id = said("id", "--home", self.home(name).path)
        return said(
            "invite", "create", "--home", self.home(founder).path, "--for", peer_id,
            "--seed", self.seed,
        )  # fmt: skip

    def join(self, founder: str, name: str, **settings: str) -> None:
        token = self.token_for(founder, name)
        self.start(
            name, "--join", token, "--listen", LOOPBACK, "--shard", self.shard(name), **settings
        )

    def until(
        self, name: str, condition: Callable[[Status], bool], timeout_s: float = 60
    ) -> Status:
        deadline = time.monotonic() + timeout_s
        status = None
        while time.monotonic() < deadline:
            status = status_of(self.home(name))
            if status is not None and condition(status):
                return status
            time.sleep(0.1)  # another process's state has no event here
        raise AssertionError(f"{name}: {status}\n{self.daemons.log(name).read_text()[-3000:]}")


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[Swarm]:
    # Short, since a socket's path is: pytest's own folder would be too long.
    with (
        tempfile.TemporaryDirectory(prefix="xt-") as sockets,
        Daemons(tmp_path / "logs").running() as daemons,
    ):
        yield Swarm(tmp_path, daemons, Path(sockets))


def test_a_swarm_outlives_its_seed_and_a_peer_that_is_killed_comes_back(swarm: Swarm):
    swarm.bootstrap(swarm.found("a", end__steps=100_000))
    slow = {"XPEER_TRAINING_THROTTLE": "0.1"}  # nodes that wait need not fill the processors
    swarm.start("a", "--bootstrap", swarm.seed, **slow)
    swarm.until("a", lambda s: s.state == "training")
    for name in "bc":
        swarm.join("a", name, **slow)
    for name in "abc":
        swarm.until(name, lambda s: s.state == "training" and s.exchanges_done >= 3)

    swarm.daemons.end(["bootstrap"])
    killed = swarm.until("b", lambda s: s.last_checkpoint_age_s is not None)
    os.kill(killed.pid, signal.SIGKILL)
    before = {name: swarm.until(name, lambda s: True).exchanges_done for name in "ac"}
    for name in "ac":
        wanted = before[name] + 3
        swarm.until(name, lambda s: s.exchanges_done >= wanted)  # noqa: B023 - called at once

    # its seed is gone, but it remembers the others' addresses
    swarm.start("b", "--bootstrap", "--listen", LOOPBACK, "--shard", swarm.shard("b"), **slow)
    back = swarm.until("b", lambda s: s.state == "training" and s.exchanges_done >= 3)
    assert back.peer_id == killed.peer_id
    assert back.progress.step > 0
    assert back.privacy.epsilon_spent >= killed.privacy.epsilon_spent  # never refunded
    swarm.until("b", lambda s: (s.progress.consensus_distance or 1.0) < 0.3)  # it caught up
    assert all(swarm.until(name, lambda s: True).trainer_restarts == 0 for name in "ac")


def test_two_peers_end_together_and_the_model_can_be_exported(swarm: Swarm):
    swarm.bootstrap(swarm.found("a", end__steps=12))
    both = {"XPEER_TRAINING_MIN_PEERS": "1"}
    swarm.start("a", "--bootstrap", swarm.seed, **both)
    swarm.join("a", "b", **both)
    ends = [swarm.until(name, lambda s: s.state == "finished", 90) for name in "ab"]
    for status in ends:
        assert status.progress.step == 12
        codes = {reason.code for reason in status.reasons if reason.severity != "note"}
        assert codes <= {"run-had-ended"}
        assert status.privacy.epsilon_spent <= status.privacy.epsilon_target
        assert status.compression_ratio == pytest.approx(3.9, abs=0.1)
        assert status.progress.consensus_distance is not None
        assert status.progress.consensus_distance < 0.02
    assert ends[0].health == "ok"
    assert ends[0].privacy.epsilon_spent > 0  # a joiner may come when all steps are taken
    for name in "ab":
        said("stop", "--home", swarm.home(name).path)
    folder = swarm.root / "model"
    said("checkpoint", "export", "--home", swarm.home("a").path, "--hf", folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    card = json.loads((folder / "privacy.json").read_text())
    spent = ends[0].privacy.epsilon_spent
    assert spent <= card["epsilon_spent"] < spent + 0.5
    assert f"epsilon at most {card['epsilon_target']:g}" in (folder / "README.md").read_text()
    verdict = json.loads(said("privacy", "verify", "--home", swarm.home("a").path, "--json"))
    assert verdict["epsilon_spent"] == pytest.approx(spent)


def test_a_spent_budget_stops_training_across_restarts(swarm: Swarm):
    swarm.found("a", end__steps=100_000, privacy__noise_multiplier=0.7, privacy__epsilon=0.8)
    swarm.start("a", "--bootstrap")
    spent = swarm.until("a", lambda s: s.state in ("budget-spent", "finished"))
    assert spent.privacy.steps_left == 0
    assert spent.privacy.epsilon_spent <= 0.8
    swarm.daemons.end(["a"])
    swarm.start("a", "--bootstrap", XPEER_DAEMON_EXIT_ON_BUDGET="1")
    assert swarm.daemons.wait("a", 60) == 6


def test_a_restored_ledger_catches_up_and_a_restored_machine_is_told(swarm: Swarm):
    """First the ledger alone, then the machine's register, too: what partners are there for."""
    swarm.bootstrap(swarm.found("a", end__steps=100_000))
    slow = {"XPEER_TRAINING_THROTTLE": "0.2"}  # at full speed they would be in each other's way
    swarm.start("a", "--bootstrap", swarm.seed, **slow)
    swarm.join("a", "b", **slow)
    ledger, register = swarm.home("b").ledger_db, swarm.register("b")

    def met(steps: int) -> Status:
        """Until partners have seen charges for more steps."""
        return swarm.until("b", lambda s: s.exchanges_done >= 1 and s.privacy.steps_charged > steps)

    def stop() -> None:
        said("stop", "--home", swarm.home("b").path)

    def restart() -> None:
        there = "--bootstrap", "--listen", LOOPBACK, "--shard", swarm.shard("b")
        swarm.start("b", *there, **slow)

    def of_b(status: Status) -> str:
        return next(p.ledger_went_back for p in status.partners if p.peer_id == peer_id)

    first = met(0)
    peer_id = first.peer_id
    old = swarm.root / "old"
    old.mkdir()
    shutil.copy2(register / "register.key", old)
    for path in (ledger, register / "register.sqlite"):  # as operating.md has it
        with closing(sqlite3.connect(path)) as of, closing(sqlite3.connect(old / path.name)) as to:
            of.backup(to)
    exchanged = swarm.until("b", lambda s: True).exchanges_done
    swarm.until("b", lambda s: s.exchanges_done > exchanged + 2)
    spent = met(first.privacy.steps_charged + 20).privacy.steps_charged
    stop()
    shutil.copy2(old / ledger.name, ledger)
    verdict = xpeer(
        "privacy", "verify", "--home", swarm.home("b").path,
        settings={"XPEER_PRIVACY_REGISTER": str(register)},
    )  # fmt: skip
    assert verdict.returncode != 0
    assert re.search(r"this ledger lacks \d+ steps", verdict.stderr)
    restart()
    assert met(spent).privacy.steps_charged > spent
    stop()
    assert "are charged to it again" in swarm.daemons.log("b").read_text()
    assert of_b(swarm.until("a", lambda s: True)) == ""

    shutil.copy2(old / ledger.name, ledger)
    shutil.rmtree(register)
    shutil.copytree(old, register, ignore=shutil.ignore_patterns(ledger.name))
    restart()
    told = swarm.until("b", lambda s: "saw more privacy charges" in str(s.reasons))
    assert told.health == "degraded"
    assert "charges now" in of_b(swarm.until("a", lambda s: True))


def test_two_daemons_with_one_text_spend_one_budget(swarm: Swarm):
    register = {"XPEER_PRIVACY_REGISTER": str(swarm.root / "register")}
    both = {**register, "XPEER_TRAINING_MIN_PEERS": "1", "XPEER_DAEMON_EXIT_ON_BUDGET": "1"}
    swarm.bootstrap(
        swarm.found("a", end__steps=100_000, privacy__noise_multiplier=0.7, privacy__epsilon=1.4)
    )
    swarm.start("a", "--bootstrap", swarm.seed, **both)
    token = swarm.token_for("a", "b")
    swarm.start("b", "--join", token, "--listen", LOOPBACK, "--shard", swarm.shard("a"), **both)
    assert [swarm.daemons.wait(name, 100) for name in "ab"] == [6, 6]
    told = [
        json.loads(said("privacy", what, "--home", swarm.home(name).path, "--json", **register))
        for what in ("status", "verify")
        for name in "ab"
    ]
    a, b = told[:2]
    assert a["epsilon_spent"] == pytest.approx(b["epsilon_spent"])
    assert 1.1 < a["epsilon_spent"] <= 1.4
    assert [each["homes"] for each in (*a["documents"], *b["documents"])] == [2, 2]
    together = sum(segment["steps"] for segment in a["documents"][0]["segments"])
    assert together == a["steps_charged"] + b["steps_charged"]
    assert min(a["steps_charged"], b["steps_charged"]) > 0
    assert [verdict["problems"] for verdict in told[2:]] == [[], []]


def test_without_its_seed_a_joiner_waits_and_says_so(swarm: Swarm):
    swarm.bootstrap(swarm.found("a", end__steps=100_000))
    token = swarm.token_for("a", "b")
    swarm.daemons.end(["bootstrap"])
    swarm.start("b", "--join", token, "--listen", LOOPBACK, "--shard", swarm.shard("b"))
    waiting = swarm.until(
        "b", lambda s: s.state == "joining" and "no seed answers" in str(s.reasons)
    )
    assert waiting.health == "degraded"
    swarm.daemons.end(["b"])
    assert swarm.daemons.wait("b", 5) == 0


def test_no_text_in_the_shard_is_one_line_and_exit_8(swarm: Swarm):
    swarm.found("a", end__steps=10)
    empty = swarm.root / "empty"
    empty.mkdir()
    done = xpeer("start", "--home", swarm.home("a").path, "--shard", empty, "--bootstrap")
    assert done.returncode == 8
    assert len(done.stderr.strip().splitlines()) == 1
    assert "data.shard" in done.stderr
