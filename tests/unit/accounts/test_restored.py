"""Files that were lost, restored from older copies, copied, or removed: never a second budget."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sqlite3
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.mortal import exit_code
from tests.unit.accounts.ledgers import about_in, by_unit
from tests.unit.privacy.test_mechanism import manifest
from xpeer.accounts import audit, model_card, register_file, report
from xpeer.accounts.account_view import AccountView
from xpeer.accounts.accountant import Segment, epsilon, epsilon_worst
from xpeer.accounts.budget import Budget
from xpeer.accounts.chain import in_parts
from xpeer.accounts.ledger import Ledger
from xpeer.accounts.register import Register
from xpeer.errors import ConfigError, LocalError

STEP, OTHER = Segment(1.0, 0.01, 20), Segment(0.8, 0.02, 5)
SIGMA, Q, DELTA = 4.0, 1.0, 1e-5


class Machine:
    """Homes with a register, whose files can be copied, lost and put back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.register = folder / "register"
        folder.mkdir(exist_ok=True)
        self._copies = itertools.count()

    def ledger(self, home: str) -> Path:
        return self.folder / f"{home}.sqlite"

    def start(self, home: str, documents: Iterable[str], unit: str = "record") -> Ledger:
        ledger = Ledger.open(self.ledger(home))
        about = msgspec.structs.replace(about_in("swarm"), unit=unit)
        try:
            self.joined = ledger.declare_documents(Register.open(self.register), documents, about)
        except LocalError:
            ledger.close()
            raise
        return ledger

    def charge(self, home: str, documents: Iterable[str], *segments: Segment) -> None:
        with self.start(home, documents) as ledger:
            for segment in segments:
                ledger.charge(segment)

    def copy(self, path: Path) -> Path:
        kept = self.folder / f"copy{next(self._copies)}"
        shutil.copytree(path, kept) if path.is_dir() else shutil.copy2(path, kept)
        return kept

    def put_back(self, copy: Path, path: Path) -> None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(copy, path) if copy.is_dir() else shutil.copy2(copy, path)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine")


def steps(ledger: Ledger) -> int:
    """Of the document that lost most."""
    return max(sum(s.steps for s in history) for history in ledger.histories())


# The register


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


# The ledger


def test_a_restored_ledger_is_charged_again_what_the_register_knows(machine: Machine) -> None:
    machine.charge("a", ["x"], STEP)
    old = machine.copy(machine.ledger("a"))
    machine.charge("a", ["x"], STEP, OTHER, OTHER)
    with Ledger.look(machine.ledger("a")) as ledger:
        counter, segments = ledger.counter, ledger.segments()
    machine.put_back(old, machine.ledger("a"))
    found = Register.look(machine.register)
    assert found is not None
    with found, Ledger.look(machine.ledger("a")) as ledger:
        (problem,) = report.verify(ledger, found).problems
        told = model_card.card_of(manifest(), "swarm", 1, ledger, found)
        assert AccountView(ledger, found).charged == segments
    assert "lacks 30 steps" in problem
    assert told.epsilon_spent is not None
    assert told.epsilon_spent >= epsilon(segments, DELTA)
    with machine.start("a", ["x"]) as ledger:
        assert machine.joined.steps_behind == 30
        assert (ledger.counter, ledger.segments()) == (counter, segments)
        again = [c.about.found_again for c in ledger.charges() if c.about]
        assert again == [False, True, True, True]
        ledger.charge(STEP)
    with machine.start("a", ["x"]) as ledger:
        assert machine.joined.steps_behind == machine.joined.recovered_steps == 0
        assert report.noted_targets(ledger) == (DELTA, 8.0)


def test_a_charge_on_its_way_to_the_ledger_is_no_restored_copy(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`xpeer privacy verify` looks while the node is between the register and its ledger."""
    machine.charge("a", ["x"], STEP)
    before = machine.copy(machine.ledger("a"))
    machine.charge("a", ["x"], STEP)
    after = machine.copy(machine.ledger("a"))
    machine.put_back(before, machine.ledger("a"))
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 3:
            machine.put_back(after, machine.ledger("a"))

    monkeypatch.setattr("time.sleep", pause)
    found = Register.look(machine.register)
    assert found is not None
    with found, Ledger.look(machine.ledger("a")) as looked:
        assert report.verify(looked, found).problems == []
    assert len(pauses) == 3


def test_what_the_register_lacks_counts_until_the_next_start(machine: Machine) -> None:
    """For every document: whatever is told after it was restored from an older copy."""
    machine.charge("a", ["x", "y"], STEP)
    old = machine.copy(machine.register)
    machine.charge("a", ["x"], OTHER, OTHER)
    machine.put_back(old, machine.register)
    found = Register.look(machine.register)
    assert found is not None
    with found, Ledger.look(machine.ledger("a")) as ledger:
        told = report.account(ledger, found)
        (of_x,) = report.files(ledger, found, [("x", "x.txt")], DELTA)
    spent = epsilon([STEP, OTHER, OTHER], DELTA)
    assert told.epsilon_spent == told.epsilon_ever == of_x.epsilon == spent
    assert [each.epsilon for each in told.documents] == [spent]
    assert "register lacks 10" in told.problems[0]
    with machine.start("a", ["x"]) as ledger:
        assert steps(ledger) == 30


def test_a_ledger_that_forgot_all_says_so(machine: Machine) -> None:
    with machine.start("a", ["x"]):
        pass
    empty = machine.copy(machine.ledger("a"))
    machine.charge("a", ["x"], STEP)
    machine.put_back(empty, machine.ledger("a"))
    found = Register.look(machine.register)
    assert found is not None
    with found, Ledger.look(machine.ledger("a")) as ledger:
        for told in (report.account, lambda *given: model_card.card_of(manifest(), "s", 1, *given)):
            with pytest.raises(LocalError, match=r"lacks 20 steps|has lost all") as caught:
                told(ledger, found)
            assert "start the node" in caught.value.remedy
        verdict = report.verify(ledger, found)
        assert "lacks 20 steps" in verdict.problems[0]
        assert verdict.epsilon_spent == epsilon([STEP], verdict.delta)


def test_the_headline_is_of_all_that_was_ever_trained_on(machine: Machine) -> None:
    many = Segment(1.0, 0.01, 3000)
    machine.charge("a", ["x"], many)
    machine.charge("a", ["y"], OTHER)
    found = Register.look(machine.register)
    assert found is not None
    with found, Ledger.look(machine.ledger("a")) as ledger:
        told = report.account(ledger, found)
        text = audit.markdown(told, report.verify(ledger, found), ledger.charges())
    assert told.epsilon_spent == epsilon([OTHER], DELTA)
    assert told.epsilon_ever == epsilon([many], DELTA) > told.epsilon_spent
    assert f"**epsilon {told.epsilon_ever:.4f}**" in text


def test_of_a_shard_all_that_was_ever_released_is_told(machine: Machine) -> None:
    """As mode update charged, which is gone: one unit, whatever text it held."""
    many = Segment(SIGMA, Q, 40)
    for text in ("x", "y"):
        with machine.start("a", [text], "shard") as ledger:
            ledger.charge(many)
    found = Register.look(machine.register)
    assert found is not None
    with found, Ledger.look(machine.ledger("a")) as ledger:
        told, verdict = report.account(ledger, found), report.verify(ledger, found)
        on_card = model_card.card_of(manifest(), "s", 1, ledger, found)
    spent = epsilon([many, many], DELTA)
    assert told.epsilon_ever == told.epsilon_spent == verdict.epsilon_spent == spent
    assert told.unit == "shard"
    assert on_card.epsilon_spent is not None
    assert on_card.epsilon_spent >= spent


def test_the_headline_is_verified_too(machine: Machine) -> None:
    machine.charge("a", ["x"], STEP)
    machine.charge("b", ["x"], *[OTHER] * 20)
    machine.charge("a", ["y"], OTHER)
    found = Register.look(machine.register)
    assert found is not None
    with found, Ledger.look(machine.ledger("a")) as ledger:
        told, verdict = report.account(ledger, found), report.verify(ledger, found)
    assert told.epsilon_ever == epsilon([STEP, *[OTHER] * 20], DELTA) == verdict.epsilon_spent
    assert told.epsilon_ever in [each.epsilon_accountant for each in verdict.checked]


def test_the_documents_that_lost_most_are_told_first(machine: Machine) -> None:
    machine.charge("a", ["gone"], *[STEP] * 30)
    for number in range(14):
        machine.charge("b", [f"x{number}"], Segment(1.0, 0.01, number + 1))
    machine.charge("a", [f"x{number}" for number in range(14)], OTHER)
    found = Register.look(machine.register)
    assert found is not None
    with found, Ledger.look(machine.ledger("a")) as ledger:
        told = report.account(ledger, found)
    assert told.classes_left_out == 3
    assert max(told.documents, key=lambda each: each.epsilon).here is False


def test_a_card_tells_of_no_unit_more_than_was_spent_on_it(machine: Machine) -> None:
    """Two shards, one after the other, and what another home charged one of them."""
    many = Segment(SIGMA, Q, 50)
    machine.charge("a", ["x"], many)
    machine.charge("a", ["y"], many)
    machine.charge("b", ["y"], many)
    found = Register.look(machine.register)
    assert found is not None
    with found, Ledger.look(machine.ledger("a")) as ledger:
        told = model_card.card_of(manifest(), "s", 1, ledger, found)
        alone = model_card.card_of(manifest(), "s", 1, ledger)
    spent = epsilon([many], DELTA)
    assert told.epsilon_spent is not None
    assert alone.epsilon_spent is not None
    assert spent <= told.epsilon_spent < spent + 0.5
    assert alone.epsilon_spent > told.epsilon_spent
    for each in (told.epsilon_spent, alone.epsilon_spent):
        assert each in (manifest().privacy.epsilon, round(each * 2) / 2)


def test_a_card_holds_for_the_delta_that_it_names(machine: Machine) -> None:
    machine.charge("a", ["x"], *[STEP] * 30)  # noted with 1e-5
    rules = msgspec.structs.replace(manifest().privacy, delta=1e-8)
    with Ledger.look(machine.ledger("a")) as ledger:
        told = model_card.card_of(
            msgspec.structs.replace(manifest(), privacy=rules), "s", 1, ledger
        )
    assert told.delta == 1e-8
    assert told.epsilon_spent is not None
    assert told.epsilon_spent >= epsilon([STEP] * 30, 1e-8)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=3), st.integers(0, 70))
def test_parts_are_the_same_steps(counts: list[int], at_least: int) -> None:
    segments = [Segment(number + 1.0, 0.1, count) for number, count in enumerate(counts)]
    parts = in_parts(segments, at_least)
    assert by_unit(*parts) == by_unit(*segments)
    assert len(parts) == max(len(segments), min(at_least, sum(counts)))


# Everything together

HOMES, TEXTS = "ab", "uvw"
SHARDS = st.sets(st.sampled_from(TEXTS), min_size=1)
ACTIONS = st.one_of(
    st.tuples(st.just("join"), st.sampled_from(HOMES), SHARDS),
    st.tuples(st.just("charge"), st.sampled_from(HOMES), st.sampled_from([STEP, OTHER])),
    st.tuples(st.just("copy"), st.none(), st.none()),
    st.tuples(st.just("lose"), st.none(), st.none()),
    st.tuples(st.just("restore"), st.sampled_from(["register", *HOMES]), st.none()),
)
NUMBERS = itertools.count()


def happen(machine: Machine, copies: dict[str, Path], what: str, which: str) -> None:
    """To a file."""
    if what == "copy":
        copies.update({home: machine.copy(machine.ledger(home)) for home in HOMES})
        copies["register"] = machine.copy(machine.register)
    elif what == "lose":
        shutil.rmtree(machine.register)
    elif which in copies:
        where = machine.register if which == "register" else machine.ledger(which)
        machine.put_back(copies[which], where)


@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(actions=st.lists(ACTIONS, max_size=14))
def test_after_any_loss_a_home_counts_all_that_it_charged(
    tmp_path: Path, actions: list[tuple[str, Any, Any]]
) -> None:
    """One file is lost or put back at a time; then both homes start again, with their shards."""
    machine = Machine(tmp_path / f"m{next(NUMBERS)}")
    truth = {home: {text: Counter[tuple[float, float]]() for text in TEXTS} for home in HOMES}
    total = {home: Counter[tuple[float, float]]() for home in HOMES}
    charges = Counter[str]()
    shard: dict[str, set[str]] = {home: {TEXTS[0]} for home in HOMES}
    copies: dict[str, Path] = {}
    for home in HOMES:
        machine.charge(home, shard[home])
    for what, which, how in actions:
        if what == "join":
            shard[which] = how
        elif what == "charge":
            machine.charge(which, shard[which], how)
            charges[which] += 1
            kind = how.noise_multiplier, how.sampling_probability
            for counted in (total[which], *(truth[which][text] for text in shard[which])):
                counted[kind] += how.steps
        else:
            happen(machine, copies, what, which)
        for home in HOMES:
            with machine.start(home, shard[home]) as ledger:
                found = Counter(by_unit(*ledger.segments()).get("record", {}))
                assert found == total[home]
                assert ledger.counter == charges[home]
        with Register.open(machine.register) as register:
            for home in HOMES:
                for text, told in register.of_documents(shard[home]).items():
                    assert Counter(by_unit(*told).get("record", {})) >= truth[home][text]
