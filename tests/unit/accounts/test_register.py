"""Accounts of documents across homes: nothing is ever counted too low."""

from __future__ import annotations

import itertools
import os
import shutil
import sqlite3
import stat
import threading
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.accounts.ledgers import by_unit
from xpeer.accounts.accountant import Segment
from xpeer.accounts.histories import History, segments_of, undominated
from xpeer.accounts.register import BudgetExceededError, Register
from xpeer.accounts.register_file import sorted_hashes
from xpeer.errors import ConfigError, LocalError

STEP = Segment(1.0, 0.01, 20)
OTHER = Segment(0.8, 0.02, 5)


def documents(*names: str) -> list[str]:
    return list(names)


def steps(register: Register) -> list[dict[tuple[float, float], int]]:
    """Histories as numbers, largest first."""
    found = [
        {(s.noise_multiplier, s.sampling_probability): s.steps for s in history}
        for history in register.histories()
    ]
    return sorted(found, key=lambda history: -sum(history.values()))


def total(register: Register) -> list[int]:
    return [sum(history.values()) for history in steps(register)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "register"


def test_another_home_with_the_same_documents_goes_on(folder: Path) -> None:
    with Register.open(folder) as a:
        joined = a.declare("a", {}, documents("x", "y", "z"))
        assert (joined.documents, joined.new, joined.elsewhere) == (3, 3, 0)
        a.charge(STEP)
    with Register.open(folder) as b:
        joined = b.declare("b", {}, documents("z", "y", "x", "x"))
        assert (joined.documents, joined.new, joined.elsewhere) == (3, 0, 3)
        assert steps(b) == [{(1.0, 0.01): 20}]
        b.charge(OTHER)
        assert steps(b) == [{(1.0, 0.01): 20, (0.8, 0.02): 5}]
    with Register.open(folder) as again:
        again.declare("a", by_unit(STEP), documents("x", "y", "z"))
        assert total(again) == [25]


def test_documents_that_another_home_begins_to_charge_are_seen_at_once(folder: Path) -> None:
    with Register.open(folder) as a, Register.open(folder) as b:
        a.declare("a", {}, documents("x", "y", "z"))
        assert a.documents_elsewhere() == 0
        b.declare("b", {}, documents("y", "z", "own"))
        b.charge(STEP)
        assert (a.documents_elsewhere(), b.documents_elsewhere()) == (2, 0)
        a.charge(OTHER)
        assert (a.documents_elsewhere(), b.documents_elsewhere()) == (2, 2)


def test_an_edited_shard_keeps_what_its_documents_lost(folder: Path) -> None:
    """x: 20 and 5 steps; new: 5; gone: 20."""
    with Register.open(folder) as register:
        register.declare("a", {}, documents("x", "gone"))
        register.charge(STEP)
        assert register.declare("a", by_unit(STEP), documents("x", "new")).new == 1
        register.charge(OTHER)
        assert total(register) == [25]  # of x; that of `new` is part of it
        register.declare("b", {}, documents("new"))
        assert total(register) == [5]
        register.declare("b", {}, documents("gone", "new"))
        assert total(register) == [20, 5]
        register.declare("b", {}, documents("never seen"))
        assert total(register) == [0]


def test_the_same_documents_again_are_the_same_span(folder: Path) -> None:
    for _ in range(3):
        with Register.open(folder) as register:
            register.declare("a", {}, documents("x", "y"))
    database = sqlite3.connect(folder / "register.sqlite")
    assert database.execute("SELECT count(*) FROM spans").fetchone() == (1,)
    assert database.execute("SELECT documents FROM classes").fetchall() == [(2,)]
    database.close()


def test_two_homes_at_once_see_one_another_before_they_charge(folder: Path) -> None:
    asked = []

    def fits(histories: list[list[Segment]], more: Segment) -> bool:
        found = max(sum(s.steps for s in history) for history in histories)
        asked.append(found)
        return found + more.steps <= 60

    with Register.open(folder) as a, Register.open(folder) as b, Register.open(folder) as c:
        a.declare("a", {}, documents("x", "y"))
        b.declare("b", {}, documents("y", "z"))
        c.declare("c", {}, documents("unrelated"))
        a.charge(STEP, fits)
        c.charge(STEP, fits)
        assert asked == []  # nobody else's charge touched these documents
        assert not a.shared
        b.charge(STEP, fits)
        assert asked == [20]
        a.charge(STEP, fits)
        assert asked == [20, 40]
        with pytest.raises(BudgetExceededError):
            b.charge(STEP, fits)
        with pytest.raises(BudgetExceededError):
            a.charge(OTHER, fits)
        assert c.shared is False
        assert (total(a), total(b)) == ([60], [60])


def test_homes_charging_from_threads_never_pass_the_limit(folder: Path) -> None:
    def fits(histories: list[list[Segment]], more: Segment) -> bool:
        return max(sum(s.steps for s in h) for h in histories) + more.steps <= 100

    homes = [Register.open(folder) for _ in range(4)]
    for number, home in enumerate(homes):
        home.declare(str(number), {}, documents("x", str(number)))
    start = threading.Barrier(4)
    charged: Counter[int] = Counter()

    def run(number: int) -> None:
        start.wait()
        for _ in range(40):
            try:
                homes[number].charge(Segment(1.0, 0.1, 1), fits)
            except BudgetExceededError:
                return
            charged[number] += 1

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with Register.open(folder) as last:
        last.declare("last", {}, documents("x"))
        assert total(last) == [sum(charged.values())]
    assert sum(charged.values()) == 100
    for home in homes:
        home.close()


def test_only_the_owner_can_read_it_and_no_hash_is_the_documents_own(folder: Path) -> None:
    before = os.umask(0)
    try:
        with Register.open(folder) as register:
            register.declare("a", {}, documents("x"))
            register.charge(STEP)
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert {stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == {0o600}
    finally:
        os.umask(before)
    database = sqlite3.connect(folder / "register.sqlite")
    (one,) = database.execute("SELECT hash FROM documents").fetchone()
    database.close()
    other = folder.with_name("other")
    with Register.open(other) as register:
        register.declare("a", {}, documents("x"))
    database = sqlite3.connect(other / "register.sqlite")
    assert database.execute("SELECT hash FROM documents").fetchone() != (one,)
    database.close()


def test_a_home_that_comes_without_its_register_brings_its_ledger(folder: Path) -> None:
    with Register.open(folder) as register:
        joined = register.declare("a", by_unit(STEP, OTHER), documents("x", "y"))
        assert joined.recovered_steps == 25
        assert total(register) == [25]
        assert register.declare("a", by_unit(STEP, OTHER), documents("x", "y")).recovered_steps == 0
        register.declare("b", {}, documents("y"))
        assert total(register) == [25]


def test_what_a_restored_register_lacks_counts_for_all_documents_of_the_home(folder: Path) -> None:
    with Register.open(folder) as register:
        register.declare("a", {}, documents("x", "y"))
        register.charge(STEP)
        old = folder.with_name("old")
        shutil.copytree(folder, old)
        register.charge(OTHER)
    shutil.rmtree(folder)
    old.rename(folder)
    with Register.open(folder) as register:
        joined = register.declare("a", by_unit(STEP, OTHER), documents("y", "z"))
        assert joined.recovered_steps == 5
        assert total(register) == [25]
        register.declare("b", {}, documents("x"))  # that the home no longer has
        assert total(register) == [25]
        register.declare("b", {}, documents("z"))
        assert total(register) == [5]


def test_other_units_are_not_added_up(folder: Path) -> None:
    with Register.open(folder) as register:
        register.declare("a", {}, documents("x"), "document", "swarm-of-a")
        register.declare("b", {}, documents("x"), "record")  # nothing was charged yet
        register.declare("a", {}, documents("x"), "document", "swarm-of-a")
        register.charge(STEP)
        with pytest.raises(ConfigError, match="each document in swarm swarm-of-a"):
            register.declare("b", {}, documents("x", "y"), "record")
        assert register.declare("b", {}, documents("y"), "record").new == 1
        register.declare("c", {}, documents("x", "y"), "document")
        assert total(register) == [20]


def test_another_unit_that_comes_while_both_run_is_refused(folder: Path) -> None:
    with Register.open(folder) as a, Register.open(folder) as b:
        a.declare("a", {}, documents("x"), "record")
        b.declare("b", {}, documents("x", "y"), "document")
        a.charge(STEP)
        with pytest.raises(ConfigError, match="don't add up"):
            b.charge(STEP)
        assert total(b) == [20]  # nothing was charged
        a.charge(STEP)


def test_a_shard_as_the_unit_adds_up_all_that_touched_it(folder: Path) -> None:
    with Register.open(folder) as register:
        register.declare("a", {}, documents("x"), "shard")
        register.charge(STEP)
        register.declare("b", {}, documents("y"), "shard")
        register.charge(OTHER)
        register.declare("b", by_unit(OTHER, unit="shard"), documents("x", "z"), "shard")
        assert total(register) == [25]


def test_what_a_home_ever_had_is_told(folder: Path) -> None:
    with Register.open(folder) as register:
        register.declare("a", {}, documents("x", "y", "gone"), "record", "one")
        register.charge(STEP)
        register.declare("b", {}, documents("x"), "record", "two")
        register.charge(OTHER)
        register.declare("a", by_unit(STEP), documents("x", "y"), "record", "one")
    found = Register.look(folder)
    assert found is not None
    with found:
        classes = found.classes("a")
        assert found.of_home("a") == by_unit(STEP)
        assert [(c.documents, c.here, c.ledgers, c.swarms) for c in classes[:2]] in (
            [(1, True, 2, ["one", "two"]), (1, True, 1, ["one"])],
            [(1, True, 1, ["one"]), (1, True, 2, ["one", "two"])],
        )
        assert (classes[2].documents, classes[2].here) == (1, False)
        with pytest.raises(LocalError, match="closed"):
            found.declare("a", {}, documents("x"))
    assert Register.look(folder.with_name("nowhere")) is None


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE charges SET steps = 0",
        "UPDATE charges SET span = 77",
        "UPDATE classes SET spans = '[77]'",
        "UPDATE classes SET spans = 'x'",
        "UPDATE head SET version = 9",
        "UPDATE head SET key_check = x'00'",
        "DELETE FROM head",
        "DROP TABLE charges",
        "DROP TABLE head",
    ],
)
def test_damage_is_refused(folder: Path, sql: str) -> None:
    with Register.open(folder) as register:
        register.declare("a", {}, documents("x"))
        register.charge(STEP)
    database = sqlite3.connect(folder / "register.sqlite")
    with database:
        database.execute(sql)
    database.close()
    with pytest.raises(LocalError) as caught:
        Register.open(folder)
    assert caught.value.remedy


@pytest.mark.parametrize("damage", ["missing", "short", "another"])
def test_a_lost_or_damaged_key_is_refused(folder: Path, damage: str) -> None:
    Register.open(folder).close()
    key = folder / "register.key"
    if damage == "missing":
        key.unlink()
    else:
        key.write_bytes(b"x" * (31 if damage == "short" else 32))
    with pytest.raises(LocalError, match=r"register\.key") as caught:
        Register.open(folder)
    assert caught.value.remedy


def test_a_folder_that_can_not_be_used_is_an_error_of_the_operator(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"privacy\.register") as caught:
        Register.open(tmp_path / "file" / "register")
    assert "privacy.register" in caught.value.remedy


def test_nothing_is_charged_before_documents_are_named(folder: Path) -> None:
    with Register.open(folder) as register, pytest.raises(LocalError, match="declared documents"):
        register.charge(STEP)


def test_nothing_is_charged_after_documents_were_refused(folder: Path) -> None:
    with Register.open(folder) as register:
        register.declare("a", {}, documents("x"), "document")
        register.charge(STEP)
        register.declare("b", {}, documents("y"), "record")
        with pytest.raises(ConfigError, match="each document"):
            register.declare("b", {}, documents("x", "y"), "record")
        with pytest.raises(LocalError, match="declared documents"):
            register.charge(STEP)


HOMES, TEXTS = "ab", "uvwx"
ACTIONS = st.one_of(
    st.tuples(st.just("join"), st.sampled_from(HOMES), st.sets(st.sampled_from(TEXTS), min_size=1)),
    st.tuples(st.just("charge"), st.sampled_from(HOMES), st.sampled_from([STEP, OTHER])),
    st.tuples(st.just("restart"), st.sampled_from(HOMES), st.none()),
)


@settings(
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(actions=st.lists(ACTIONS, max_size=12))
def test_every_document_has_lost_exactly_what_its_shards_were_charged(
    tmp_path: Path, actions: list[tuple[str, str, Any]]
) -> None:
    """Against an account kept per document, for any order of starts, edits and charges."""
    folder = tmp_path / f"r{next(NUMBERS)}"
    truth: dict[str, Counter[tuple[float, float]]] = {text: Counter() for text in TEXTS}
    charged: dict[str, list[Segment]] = {home: [] for home in HOMES}
    shard: dict[str, frozenset[str]] = {}
    open_: dict[str, Register] = {}
    for what, home, how in actions:
        if what == "join" or home not in open_:
            texts = how if what == "join" else {TEXTS[0]}
            if home in open_:
                open_[home].close()
            open_[home] = Register.open(folder)
            shard[home] = frozenset(texts)
            open_[home].declare(home, by_unit(*charged[home]), texts)
        if what == "restart":
            open_[home].close()
            open_[home] = Register.open(folder)
            declared = open_[home].declare(home, by_unit(*charged[home]), shard[home])
            assert declared.recovered_steps == 0
        if what == "charge":
            open_[home].charge(how)
            charged[home].append(how)
            for text in shard[home]:
                truth[text][how.noise_multiplier, how.sampling_probability] += how.steps
    for home, register in open_.items():
        expected = undominated([dict(truth[text]) for text in shard[home]])
        assert sorted(map(sorted, as_items(steps(register)))) == sorted(
            map(sorted, as_items(expected))
        )
        register.close()


NUMBERS = itertools.count()


def as_items(found: Iterable[History]) -> list[list[tuple[tuple[float, float], int]]]:
    return [list(history.items()) for history in found]


@given(
    st.lists(
        st.dictionaries(
            st.tuples(st.sampled_from([0.5, 1.0]), st.sampled_from([0.1, 0.2, 0.3])),
            st.integers(1, 40),
        ),
        max_size=40,
    )
)
def test_every_history_is_covered_by_one_that_is_kept(found: list[History]) -> None:
    kept = undominated(found)
    assert len(kept) <= 8
    for history in found:
        assert any(
            all(count <= other.get(kind, 0) for kind, count in history.items()) for other in kept
        )
        assert all(s.steps > 0 for s in segments_of(history))


@given(st.lists(st.binary(min_size=16, max_size=16) | st.sampled_from([b"\xff" * 16, bytes(16)])))
def test_hashes_are_sorted_as_bytes_are(hashes: list[bytes]) -> None:
    """A register that earlier versions wrote knows a shard by the digest of them."""
    assert sorted_hashes(hashes) == b"".join(sorted(set(hashes)))
