from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.accounts.ledgers import ROOT, about_in, open_declared
from xpeer.accounts.accountant import Segment
from xpeer.accounts.ledger import Ledger
from xpeer.accounts.register import Register
from xpeer.errors import ConfigError, LedgerError, LocalError
from xpeer.trainer.answers import error_of, failure_of

STEP = Segment(1.0, 0.01, 20)

CHARGE_AND_HANG = """
import sys, time
from pathlib import Path
from xpeer.accounts.accountant import Segment
from tests.unit.accounts.ledgers import open_declared

ledger = open_declared(Path(sys.argv[1]))
for _ in range(3):
    ledger.charge(Segment(1.0, 0.01, 20))
print(ledger.id, flush=True)
time.sleep(600)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


def made(path: Path, charges: int = 3) -> str:
    with open_declared(path) as ledger:
        for _ in range(charges):
            ledger.charge(STEP)
        return ledger.id


def alter(path: Path, sql: str, *values: Any) -> None:
    connection = sqlite3.connect(path)
    with connection:
        connection.execute(sql, values)
    connection.close()


def test_charges_add_up_and_survive(path: Path) -> None:
    other = Segment(0.7, 0.02, 5)
    with open_declared(path) as ledger:
        assert (ledger.counter, ledger.steps_charged, ledger.segments()) == (0, 0, [])
        assert [ledger.charge(s) for s in (STEP, other, STEP)] == [1, 2, 3]
    with Ledger.open(path, must_exist=ledger.id) as again:
        assert again.id == ledger.id
        assert (again.counter, again.steps_charged) == (3, 45)
        assert again.segments() == [Segment(1.0, 0.01, 40), other]
    with open_declared(path) as again:
        assert again.charge(other) == 4


UNDECLARED = "before its documents were declared"


def test_nothing_is_charged_before_documents_are_declared(path: Path) -> None:
    """Or the machine's register would never hear of it."""
    with Ledger.open(path) as ledger:
        with pytest.raises(LocalError, match=UNDECLARED) as caught:
            ledger.charge(STEP)
        assert caught.value.remedy
        assert ledger.counter == 0
        ledger.declare_documents(
            Register.open(path.with_name("register")), ["x"], about_in("swarm")
        )
        assert ledger.charge(STEP) == 1


def test_a_ledger_without_text_catches_up_and_is_not_charged(path: Path) -> None:
    empty = path.with_name("empty")
    open_declared(path).close()
    empty.write_bytes(path.read_bytes())
    with open_declared(path) as ledger:
        ledger.charge(STEP)
    empty.replace(path)
    register = Register.open(path.with_name("register"))
    with register, Ledger.open(path) as ledger:
        assert ledger.catch_up(register, about_in("swarm")) == 20
        with pytest.raises(LocalError, match=UNDECLARED):
            ledger.charge(STEP)
        assert ledger.steps_charged == 20


def test_documents_that_the_register_refused_are_not_charged(path: Path) -> None:
    with open_declared(path, ["x"]) as ledger:
        ledger.charge(STEP)
    register = path.with_name("register")
    by_document = msgspec.structs.replace(about_in("swarm"), unit="document")
    with Ledger.open(path.with_name("other.sqlite")) as other:
        with pytest.raises(ConfigError, match="don't add up"):
            other.declare_documents(Register.open(register), ["x"], by_document)
        with pytest.raises(LocalError, match=UNDECLARED):
            other.charge(STEP)
        assert other.counter == 0


def test_only_the_owner_can_read_it(path: Path) -> None:
    before = os.umask(0)
    try:
        ledger = open_declared(path)
        ledger.charge(STEP)
    finally:
        os.umask(before)
    files = list(path.parent.glob(f"{path.name}*"))
    assert path in files
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    ledger.close()
    path.chmod(0o644)
    Ledger.open(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_two_ledgers_have_different_ids(tmp_path: Path) -> None:
    assert made(tmp_path / "a") != made(tmp_path / "b")


def test_a_setting_is_stored_once(path: Path) -> None:
    with Ledger.open(path) as ledger:
        assert ledger.settings("noise_multiplier") is None
        assert ledger.set_once("noise_multiplier", "0.7") == "0.7"
        assert ledger.set_once("noise_multiplier", "0.1") == "0.7"
    with Ledger.open(path) as ledger:
        assert ledger.settings("noise_multiplier") == "0.7"


def test_kill_in_the_middle_loses_no_charge(path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHARGE_AND_HANG, str(path)],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert child.stdout is not None
        ledger_id = child.stdout.readline().strip()
        os.kill(child.pid, signal.SIGKILL)
    finally:
        child.kill()
        child.communicate()
    with Ledger.open(path, must_exist=ledger_id) as ledger:
        assert (ledger.counter, ledger.steps_charged) == (3, 60)


def test_the_main_file_alone_holds_every_charge(path: Path, tmp_path: Path) -> None:
    """A backup that forgets the -wal file must not give steps back."""
    copy = tmp_path / "copy.sqlite"
    with open_declared(path) as ledger:
        for _ in range(3):
            ledger.charge(STEP)
        copy.write_bytes(path.read_bytes())
    with Ledger.open(copy) as restored:
        assert restored.steps_charged == 60


def test_another_ledger_than_the_checkpoints_is_refused(path: Path) -> None:
    made(path)
    with pytest.raises(LocalError, match="checkpoint was made with 00ff"):
        Ledger.open(path, must_exist="00ff")


def test_a_lost_ledger_is_not_replaced(path: Path) -> None:
    ledger_id = made(path)
    path.unlink()
    with pytest.raises(LocalError, match=r"ledger\.sqlite is missing") as caught:
        Ledger.open(path, must_exist=ledger_id)
    assert "restore" in caught.value.remedy
    assert not path.exists()
    path.with_name(path.name + "-wal").write_bytes(b"left")
    with pytest.raises(LocalError, match="is missing"):
        Ledger.open(path)
    assert not path.exists()


def test_an_interrupted_start_leaves_no_ledger_and_the_next_one_works(path: Path) -> None:
    path.with_name(path.name + ".new").write_bytes(b"half")
    assert made(path)
    assert not path.with_name(path.name + ".new").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"not a database at all" * 100,
        lambda data: data[:4096],
        lambda data: data[:100] + os.urandom(len(data) - 100),
    ],
    ids=["empty", "garbage", "truncated", "overwritten"],
)
def test_a_corrupt_file_is_named_and_kept(path: Path, damage: Callable[[bytes], bytes]) -> None:
    made(path)
    data = damage(path.read_bytes())
    path.write_bytes(data)
    with pytest.raises(LocalError, match=r"ledger\.sqlite") as caught:
        Ledger.open(path)
    assert "restore" in caught.value.remedy
    assert path.stat().st_size == len(data)


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE charges SET steps = 1 WHERE counter = 2",
        "UPDATE charges SET steps = 1, total_steps = 41 WHERE counter = 3",
        "UPDATE charges SET noise_multiplier = 2.0 WHERE counter = 1",
        "UPDATE charges SET sampling_probability = 0.001",
        "UPDATE charges SET noise_multiplier = -1.0 WHERE counter = 3",
        "DELETE FROM charges WHERE counter = 3",
        "DELETE FROM charges WHERE counter = 1",
        "DELETE FROM charges",
        "UPDATE head SET counter = 2",
        "UPDATE head SET ledger_id = 'another'",
        "DELETE FROM head",
        "UPDATE charges SET mechanism = 'laplace' WHERE counter = 2",
        "UPDATE head SET version = 3",
        "DROP TABLE charges",
        "DROP TABLE head",
    ],
)
def test_what_does_not_add_up_is_refused(path: Path, sql: str) -> None:
    made(path)
    alter(path, sql)
    with pytest.raises(LocalError, match=r"ledger\.sqlite") as caught:
        Ledger.open(path)
    assert caught.value.remedy


def test_a_second_writer_is_noticed(path: Path) -> None:
    """By the file itself: where both have one register, that refuses first."""
    a, b = path.with_name("register a"), path.with_name("register b")
    with open_declared(path, register=a) as first, open_declared(path, register=b) as second:
        second.charge(STEP)
        with pytest.raises(LocalError, match="another process"):
            first.charge(STEP)
        with pytest.raises(LocalError, match="failed before"):
            first.charge(STEP)
        assert second.charge(STEP) == 2
    with Ledger.open(path) as ledger:
        assert ledger.counter == 2


def test_a_failed_write_charges_nothing_and_stops_the_account(path: Path) -> None:
    with open_declared(path) as ledger:
        ledger.charge(STEP)
        alter(
            path, "CREATE TRIGGER full BEFORE INSERT ON charges BEGIN SELECT RAISE(ABORT, 'x'); END"
        )
        for _ in range(2):
            with pytest.raises(LocalError):
                ledger.charge(STEP)
        assert (ledger.counter, ledger.steps_charged) == (1, 20)
    alter(path, "DROP TRIGGER full")
    with open_declared(path) as ledger:
        assert ledger.counter == 2  # the register was charged first, and errs upwards
        assert ledger.charge(STEP) == 3


def test_a_full_disk_can_be_told_from_a_damaged_ledger(path: Path) -> None:
    with open_declared(path) as ledger:
        ledger.charge(STEP)
        (pages,) = ledger._connection.execute("PRAGMA page_count").fetchone()
        ledger._connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(LedgerError, match="is full") as full:
            for _ in range(1000):
                ledger.charge(STEP)
    assert type(error_of(failure_of(full.value))) is LedgerError, "as the daemon hears of it"


def test_a_closed_ledger_refuses(path: Path) -> None:
    ledger = open_declared(path)
    ledger.close()
    with pytest.raises(LocalError):
        ledger.charge(STEP)
    with pytest.raises(LocalError):
        ledger.settings("x")


@pytest.mark.parametrize("what", [Segment(1.0, 0.1, 0), Segment(1.0, 0.1, 1 << 31), (1.0, 0.1, 1)])
def test_only_charges_that_make_sense_are_taken(path: Path, what: Any) -> None:
    with open_declared(path) as ledger:
        with pytest.raises(LocalError, match="can't charge"):
            ledger.charge(what)
        assert ledger.counter == 0


def test_a_folder_that_is_missing_is_an_error_of_the_operator(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match="can't be made"):
        Ledger.open(tmp_path / "nowhere" / "ledger.sqlite")


def test_threads_charge_one_after_the_other(path: Path) -> None:
    start = threading.Barrier(4)

    def charge(_: int) -> list[int]:
        start.wait()
        return [ledger.charge(STEP) for _ in range(10)]

    with open_declared(path) as ledger, ThreadPoolExecutor(4) as threads:
        counters = [c for part in threads.map(charge, range(4)) for c in part]
        assert sorted(counters) == list(range(1, 41))
        assert sum(s.steps for s in ledger.segments()) == ledger.steps_charged == 800
    with Ledger.open(path) as ledger:
        assert ledger.counter == 40
