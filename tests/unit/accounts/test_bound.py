"""A home that is used with another register than the one that its charges are in."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.unit.accounts.ledgers import charge_file_alone
from tests.unit.accounts.machines import STEP, Machine, steps
from xpeer.accounts.bound import look_at_register, use_register
from xpeer.accounts.ledger import Ledger
from xpeer.accounts.register import Register
from xpeer.errors import ConfigError


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Two homes with a document in common, both charged."""
    made = Machine(tmp_path / "machine")
    made.charge("a", ["x", "y"], STEP)
    made.charge("b", ["x"], STEP)
    return made


def forget(path: Path) -> None:
    """Make it a ledger of a version that noted no register."""
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("DELETE FROM settings")


def refused(machine: Machine, home: str = "a") -> ConfigError:
    before = machine.ledger(home).read_bytes()
    with pytest.raises(ConfigError, match="is not this home's register") as caught:
        machine.start(home, ["x"])
    with Ledger.look(machine.ledger(home)) as ledger:
        assert ledger.steps_charged
    assert machine.ledger(home).read_bytes() == before
    return caught.value


def test_another_register_is_refused_and_not_begun(machine: Machine) -> None:
    own, machine.register = machine.register, machine.folder / "other"
    error = refused(machine)
    assert str(own) in error.problem
    assert "XPEER_PRIVACY_REGISTER" in error.remedy
    assert not machine.register.exists()
    with Ledger.look(machine.ledger("a")) as ledger:
        register = look_at_register(ledger, machine.register)
        assert register is not None, "reports go by its own"
        assert register.path.parent == own
        register.close()
        own.rename(machine.folder / "away")
        with pytest.raises(ConfigError, match="is not"):
            look_at_register(ledger, machine.register)


def test_another_register_that_is_there_is_refused(machine: Machine) -> None:
    machine.register = machine.folder / "other"
    Register.open(machine.register).close()
    refused(machine)
    machine.charge("c", ["x"], STEP)  # a home that was never charged may begin in any


def test_a_home_that_is_not_there_for_this_user_is_refused_all_the_same(machine: Machine) -> None:
    """A sandbox may hide the home's own register: that it isn't seen doesn't mean it's lost."""
    shutil.move(machine.register, machine.folder / "hidden")
    machine.register = machine.folder / "other"
    refused(machine)


def test_a_register_that_was_moved_with_its_home_goes_on(machine: Machine) -> None:
    elsewhere = Machine(machine.folder / "elsewhere")
    shutil.move(machine.register, elsewhere.register)
    shutil.move(machine.ledger("a"), elsewhere.ledger("a"))
    with elsewhere.start("a", ["x"]) as ledger:
        assert steps(ledger) == 40
        ledger.charge(STEP)
        noted = ledger.noted_register()
    assert noted is not None
    assert noted[1] == str(elsewhere.register)


def test_a_link_to_the_register_is_the_register(machine: Machine) -> None:
    link = machine.folder / "link"
    link.symlink_to(machine.register)
    machine.register = link
    machine.charge("a", ["x"], STEP)


def test_a_register_that_was_lost_is_begun_anew_in_its_place(machine: Machine) -> None:
    shutil.rmtree(machine.register)
    machine.charge("b", ["x"], STEP)
    with machine.start("a", ["x"]) as ledger:
        assert steps(ledger) == 60


def test_a_home_goes_on_with_another_register_if_its_operator_says_so(machine: Machine) -> None:
    machine.register = machine.folder / "other"
    with Ledger.open(machine.ledger("a")) as ledger:
        use_register(ledger, machine.register)
    with machine.start("a", ["x"]) as ledger:
        assert machine.joined.recovered_steps == 20
        ledger.charge(STEP)
    with machine.start("a", ["x"]) as ledger:
        assert steps(ledger) == 40
    refused(machine, "b")


def test_an_old_ledger_goes_on_only_with_a_register_that_knows_it(machine: Machine) -> None:
    forget(machine.ledger("a"))
    machine.charge("a", ["x"], STEP)
    Ledger.open(machine.ledger("old")).close()
    charge_file_alone(machine.ledger("old"), STEP)
    assert "knows nothing of that" in refused(machine, "old").problem
    with Ledger.look(machine.ledger("old")) as ledger:  # it can be read all the same
        found = look_at_register(ledger, machine.register)
    assert found is not None
    found.close()


def test_what_is_charged_again_without_text_is_noted_too(machine: Machine) -> None:
    forget(machine.ledger("a"))
    older = machine.copy(machine.ledger("a"))
    machine.charge("a", ["x"], STEP)
    machine.put_back(older, machine.ledger("a"))
    with Ledger.open(machine.ledger("a")) as ledger, Register.open(machine.register) as register:
        about = ledger.charges()[0].about
        assert about is not None
        assert ledger.catch_up(register, about) == 20
        noted = ledger.noted_register()
        assert noted == (register.id, str(machine.register))
