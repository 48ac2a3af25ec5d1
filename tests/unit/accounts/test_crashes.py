"""kill -9 at every write of a window: what is charged is never less than what was taken."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
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


original = sqlite3.connect


class Deaths:
    """What kill -9 would leave on the disk before and after every statement to SQLite.

    A killed process loses nothing that it has written: a copy of the files is what the next one
    finds. Copies that are equal are kept once.
    """

    def __init__(self, folder: Path, copies: Path) -> None:
        self._folder, self._copies = folder, copies
        self._seen: set[bytes] = set()
        self.statements = 0

    def left(self) -> list[Path]:
        return sorted(self._copies.iterdir())

    def connect(self, *args: Any, **kwargs: Any) -> sqlite3.Connection:
        deaths = self

        class Watched(sqlite3.Connection):
            def execute(self, *given: Any) -> sqlite3.Cursor:
                deaths.statements += 1
                deaths.note()
                cursor = super().execute(*given)
                deaths.note()
                return cursor

        return original(*args, factory=Watched, **kwargs)

    def note(self) -> None:
        digest = hashlib.sha256()
        for file in sorted(self._folder.rglob("*")):
            if file.is_file() and file.suffix != ".sqlite-shm":  # SQLite makes it anew
                digest.update(f"{file.name} {file.stat().st_size}\n".encode())
                digest.update(file.read_bytes())
        if digest.digest() not in self._seen:
            self._seen.add(digest.digest())
            shutil.copytree(self._folder, self._copies / f"{len(self._seen):04}")


def taken(folder: Path) -> int:
    path = folder / "taken"
    return path.stat().st_size if path.exists() else 0


def test_killed_at_every_statement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after each one; then the node starts again, and is charged at least as much."""
    folder, copies = tmp_path / "node", tmp_path / "copies"
    folder.mkdir()
    copies.mkdir()
    deaths = Deaths(folder, copies)
    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", deaths.connect)
        windows(folder)
    assert deaths.statements > 40
    left = deaths.left()
    assert len(left) > 20  # so many of them changed a file
    assert {taken(each) for each in left} == {0, 4, 8, 12}  # in each window
    for each in left:
        check(each)


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
