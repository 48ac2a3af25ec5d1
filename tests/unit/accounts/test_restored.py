"""Files that were lost, restored from older copies, copied, or removed: never a second budget."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.accounts.ledgers import by_unit
from tests.unit.accounts.machines import DELTA, OTHER, SIGMA, STEP, Machine, Q, steps
from tests.unit.privacy.test_mechanism import manifest
from xpeer.accounts import audit, model_card, report
from xpeer.accounts.account_view import AccountView
from xpeer.accounts.accountant import Segment, epsilon
from xpeer.accounts.chain import in_parts
from xpeer.accounts.ledger import Ledger
from xpeer.accounts.register import Register
from xpeer.errors import LocalError


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
