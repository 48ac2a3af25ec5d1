"""kill -9 at every write of a window: what is charged is never less than what was taken."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.accounts.ledgers import open_declared
from xpeer.accounts.accountant import Segment, epsilon, epsilon_worst
from xpeer.accounts.budget import Budget
from xpeer.accounts.ledger import Ledger
from xpeer.accounts.register import Register
from xpeer.errors import LocalError

SIGMA, Q, DELTA = 4.0, 1.0, 1e-5
DOCUMENTS = ["x", "y"]


def opened(folder: Path) -> Ledger:
    return open_declared(folder / "ledger.sqlite", DOCUMENTS)


def budget(ledger: Ledger) -> Budget:
    return Budget(ledger, epsilon=8.6, delta=DELTA, noise_multiplier=SIGMA, sampling_probability=Q)


def windows(folder: Path) -> None:
    """Three windows of a node; every step is noted before it is taken."""
    ledger = opened(folder)
    made = budget(ledger)
    with (folder / "taken").open("ab", buffering=0) as taken:
        for _ in range(3):
            for _ in range(made.begin(4)):
                made.use()
                taken.write(b".")
            made.prepare(2)
    made.close()
    ledger.close()


def in_child(run: Callable[[], None]) -> int:
    """Its exit code, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Countdown:
    """Ends the process, as kill -9 does, before its so many-th statement to SQLite, or right after.

    A statement that was carried out when the process ends may be on the disk or not; both kinds of
    ends are tried at every place.
    """

    def __init__(self, statements: int, after: bool) -> None:
        self.left, self.after = statements, after

    def connect(self, *args: Any, **kwargs: Any) -> sqlite3.Connection:
        countdown = self

        class Mortal(sqlite3.Connection):
            def execute(self, *given: Any) -> sqlite3.Cursor:
                countdown.left -= 1
                if countdown.left == 0 and not countdown.after:
                    os.kill(os.getpid(), signal.SIGKILL)
                cursor = super().execute(*given)
                if countdown.left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return cursor

        return original(*args, factory=Mortal, **kwargs)


original = sqlite3.connect


def taken(folder: Path) -> int:
    path = folder / "taken"
    return path.stat().st_size if path.exists() else 0


def test_killed_at_every_statement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after each one; then the node starts again, and is charged at least as much."""
    epsilon([Segment(SIGMA, Q, 1)], DELTA)  # imports the library once, not in every child
    clean = tmp_path / "clean"
    clean.mkdir()
    windows(clean)
    statement, ended = 0, False
    while not ended:
        statement += 1
        for after in (False, True):
            folder = tmp_path / f"{statement}-{after}"
            folder.mkdir()
            countdown = Countdown(statement, after)

            def mortal(folder: Path = folder, countdown: Countdown = countdown) -> None:
                monkeypatch.setattr(sqlite3, "connect", countdown.connect)
                windows(folder)

            code = in_child(mortal)
            assert code in (0, -signal.SIGKILL)
            ended = code == 0
            check(folder)
            shutil.rmtree(folder)
    assert statement > 40  # it was killed at so many places


def check(folder: Path) -> None:
    before = taken(folder)
    with Register.open(folder / "register") as other:  # what another home would see at once
        other.declare("another home", {}, DOCUMENTS)
        assert sum(segment.steps for segment in other.histories()[0]) >= before
    with opened(folder) as ledger:
        truth = epsilon([Segment(SIGMA, Q, before)], DELTA)
        assert ledger.steps_charged >= before
        assert sum(s.steps for s in ledger.histories()[0]) >= ledger.steps_charged
        assert epsilon_worst(ledger.histories(), DELTA) >= truth
        assert epsilon(ledger.segments(), DELTA) >= truth
        ledger.charge(Segment(SIGMA, Q, 1))  # it goes on
        assert ledger.histories()[0][0].steps >= before + 1


def test_the_register_is_charged_before_the_ledger(tmp_path: Path) -> None:
    with opened(tmp_path) as ledger:
        ledger.charge(Segment(SIGMA, Q, 5))
        database = sqlite3.connect(tmp_path / "ledger.sqlite")
        with database:
            database.execute(
                "CREATE TRIGGER full BEFORE INSERT ON charges BEGIN SELECT RAISE(ABORT, 'x'); END"
            )
        database.close()
        with pytest.raises(LocalError, match="x"):
            ledger.charge(Segment(SIGMA, Q, 7))
        assert ledger.steps_charged == 5
        assert ledger.histories()[0][0].steps == 12
