"""A register that was lost, restored or copied: never a second budget."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
from pathlib import Path

import msgspec
import pytest

from tests.mortal import exit_code
from tests.unit.accounts.ledgers import about_in, by_unit
from tests.unit.accounts.machines import DELTA, SIGMA, STEP, Machine, Q, steps
from xpeer.accounts import register_file
from xpeer.accounts.accountant import Segment, epsilon, epsilon_worst
from xpeer.accounts.budget import Budget
from xpeer.accounts.ledger import Ledger
from xpeer.accounts.register import Register
from xpeer.errors import ConfigError, LocalError


def test_a_document_that_comes_back_after_the_registers_loss_has_lost_what_it_lost(
    machine: Machine,
) -> None:
    machine.charge("a", ["x", "y"], STEP)
    shutil.rmtree(machine.register)
    with machine.start("a", ["y"]) as ledger:
        assert machine.joined.recovered_steps == 20
        assert steps(ledger) == 20
    with machine.start("a", ["x"]) as ledger:
        assert (machine.joined.recovered_steps, machine.joined.unknown_steps) == (0, 20)
        assert steps(ledger) == 20
    with machine.start("a", ["new"]) as ledger:  # nobody knows that it is
        assert steps(ledger) == 20
    with machine.start("b", ["unrelated"]) as ledger:
        assert steps(ledger) == 0


def test_what_is_recovered_keeps_its_unit(machine: Machine) -> None:
    machine.charge("a", ["x"], STEP)
    shutil.rmtree(machine.register)
    with pytest.raises(ConfigError, match=r"privacy of each record in swarm swarm.*each document"):
        machine.start("a", ["x"], "document")
    with machine.start("a", ["x"]) as ledger:
        assert steps(ledger) == 20


def test_records_of_other_lengths_are_other_units(machine: Machine) -> None:
    for cut, charged in (("128 byte tokens", True), ("256 byte tokens", False)):
        about = msgspec.structs.replace(about_in("swarm"), cut=cut)
        with Ledger.open(machine.ledger(cut[:3])) as ledger:
            if charged:
                ledger.declare_documents(Register.open(machine.register), ["x"], about)
                ledger.charge(STEP)
                continue
            with pytest.raises(ConfigError, match=r"record of 128 byte.*record of 256 byte"):
                ledger.declare_documents(Register.open(machine.register), ["x"], about)
            assert ledger.declare_documents(Register.open(machine.register), ["y"], about).new == 1


def test_charges_of_others_that_are_not_the_largest_are_noticed(machine: Machine) -> None:
    """x lost 100 steps elsewhere; y none, but 60 here. Then y loses 60 elsewhere."""
    many = Segment(SIGMA, Q, 100)
    machine.charge("b", ["x"], many)
    machine.charge("a", ["y"], Segment(SIGMA, Q, 60))
    limit = epsilon([Segment(SIGMA, Q, 130)], DELTA)
    with machine.start("a", ["x", "y"]) as ledger, machine.start("c", ["y"]) as c:
        budget = Budget(
            ledger, epsilon=limit, delta=DELTA, noise_multiplier=SIGMA, sampling_probability=Q
        )
        assert budget.left == 30
        c.charge(Segment(SIGMA, Q, 60))
        assert budget.begin(30) == 10
        budget.close()
        assert epsilon_worst(ledger.histories(), DELTA) <= limit


def test_a_copy_of_a_home_beside_its_original_is_refused(machine: Machine) -> None:
    machine.charge("a", ["x"], STEP)
    shutil.copy2(machine.ledger("a"), machine.ledger("copy"))
    with machine.start("a", ["x"]) as original, machine.start("copy", ["x"]) as copy:
        original.charge(STEP)
        with pytest.raises(ConfigError, match="a copy of this home"):
            copy.charge(STEP)
        original.charge(STEP)
        assert steps(original) == 60
    with machine.start("copy", ["x"]) as copy:
        assert machine.joined.steps_behind == 40
        assert steps(copy) == copy.steps_charged == 60


def start_and_die(machine: Machine) -> None:
    machine.start("a", ["x"])
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_register_that_was_restored_over_a_newer_log_is_refused(machine: Machine) -> None:
    """SQLite takes the log's pages for the copy's: a span without its documents."""
    machine.charge("a", ["x"], STEP)
    old = machine.copy(machine.register)
    machine.charge("a", ["y"], STEP, STEP)
    assert exit_code(start_and_die, machine) == -signal.SIGKILL
    for file in old.iterdir():
        shutil.copy2(file, machine.register / file.name)
    with pytest.raises(LocalError, match="restored in part") as caught:
        machine.start("a", ["y"])
    assert "without register.sqlite-wal" in caught.value.remedy
    for name in ("register.sqlite-wal", "register.sqlite-shm"):
        (machine.register / name).unlink(missing_ok=True)
    machine.put_back(old, machine.register)
    with machine.start("a", ["y"]) as ledger:
        assert steps(ledger) == 40


@pytest.mark.parametrize("table", ["classes", "documents"])
def test_a_shard_that_the_register_forgot_has_no_whole_budget(machine: Machine, table: str) -> None:
    machine.charge("a", ["x"], STEP)
    database = sqlite3.connect(machine.register / register_file.NAME)
    with database:
        database.execute(f"DELETE FROM {table}")
    database.close()
    with pytest.raises(LocalError, match="restored in part"):
        machine.start("a", ["x"])
    found = Register.look(machine.register)
    assert found is not None
    with found:
        if table == "classes":
            with pytest.raises(LocalError, match="knows no document"):
                found.histories_of(Ledger.look(machine.ledger("a")).id)


def test_a_register_that_is_lost_beside_its_key_is_not_begun_anew(machine: Machine) -> None:
    machine.charge("a", ["x"], STEP)
    (machine.register / register_file.NAME).unlink()
    for _ in range(2):
        with pytest.raises(LocalError, match=r"register\.sqlite is missing") as caught:
            Register.open(machine.register)
        assert "restore" in caught.value.remedy
        with pytest.raises(LocalError, match="is missing"):
            Register.look(machine.register)


def begin_and_die(folder: Path, at: int) -> None:
    """Open a register that is not there yet, and end before this rename."""
    rename, left = Path.rename, at

    def mortal(self: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(self, target)

    Path.rename = mortal  # type: ignore[method-assign,assignment]
    Register.open(folder)


def test_killed_while_it_begins_a_register(tmp_path: Path) -> None:
    """Before each rename; the next start finds neither file, or ends what was begun."""
    for at in (1, 2):
        folder = tmp_path / str(at)
        assert exit_code(begin_and_die, folder, at) == -signal.SIGKILL
        assert Register.look(folder) is None
        key = folder / register_file.KEY
        made = key.read_bytes() if at == 2 else None
        Register.open(folder).close()
        assert made in (None, key.read_bytes())
        assert {file.name for file in folder.iterdir()} == {"register.sqlite", "register.key"}


@pytest.mark.parametrize("what", ["register", "ledger"])
@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_files_that_go_while_a_node_runs_end_its_charges(
    machine: Machine, what: str, how: str
) -> None:
    machine.charge("a", ["x"], STEP)
    path = machine.ledger("a") if what == "ledger" else machine.register / register_file.NAME
    old = machine.copy(path)
    with machine.start("a", ["x"]) as ledger:
        ledger.charge(STEP)
        path.unlink()
        if how == "replaced":
            shutil.copy2(old, path)
        for _ in range(2):
            with pytest.raises(LocalError, match=f"{what} .*(removed or replaced|failed before)"):
                ledger.charge(STEP)
        assert ledger.steps_charged == 40


def test_a_register_of_the_first_version_goes_on(machine: Machine) -> None:
    machine.charge("a", ["x"], STEP)
    database = sqlite3.connect(machine.register / register_file.NAME)
    with database:
        database.execute("DROP TABLE ledgers")
        database.execute("UPDATE head SET version = 1")
    database.close()
    found = Register.look(machine.register)
    assert found is not None
    with found:
        own = found.of_home(Ledger.look(machine.ledger("a")).id)
    assert own == by_unit(STEP)
    machine.charge("a", ["x"], STEP)
    with machine.start("a", ["x"]) as ledger:
        assert (machine.joined.counter, steps(ledger)) == (2, 40)
    about = msgspec.structs.replace(about_in("swarm"), cut="64 byte tokens")
    with Ledger.open(machine.ledger("a")) as ledger:  # what was not noted is not held against it
        ledger.declare_documents(Register.open(machine.register), ["x"], about)
        assert steps(ledger) == 40
