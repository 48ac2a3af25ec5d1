"""The table of phases, and the drawing of it in the docs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from xpeer.errors import LocalError
from xpeer.phase import TABLE, Phase, TrainerPhase, traits_of
from xpeer_daemon.life import Life

ARCHITECTURE = Path(__file__).parents[2] / "docs" / "architecture.md"


def drawn() -> set[tuple[str, str]]:
    (diagram,) = re.findall(
        r"```mermaid\nstateDiagram-v2\n(.*?)```", ARCHITECTURE.read_text(), re.S
    )
    names = dict(re.findall(r'state "([a-z-]+)" as (\w+)', diagram))
    shown = {short: name for name, short in names.items()}
    arrows = re.findall(r"^ *(\S+) --> (\S+)$", diagram, re.M)
    return {(shown.get(a, a), shown.get(b, b)) for a, b in arrows}


def test_the_drawing_has_every_arrow_of_the_table_and_no_other() -> None:
    table = {
        (before.value, after.value)
        for before, traits in TABLE.items()
        for after in traits.then - {Phase.STOPPING}
    }
    assert drawn() == table | {("[*]", "starting")}


def test_the_docs_say_what_each_phase_means() -> None:
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| ([^|]+) \|", ARCHITECTURE.read_text(), re.M))
    assert {phase: rows.get(phase) for phase in Phase} == {p: p.traits.meaning for p in Phase}


def test_every_phase_can_be_reached_and_all_but_the_last_can_stop() -> None:
    reached = {Phase.STARTING}
    while more := {after for phase in reached for after in phase.traits.then} - reached:
        reached |= more
    assert reached == set(Phase) == set(TABLE)
    ends = {phase for phase in Phase if Phase.STOPPING not in phase.traits.then}
    assert ends == {Phase.STOPPING}


def test_a_pause_can_interrupt_every_exchange_and_lead_back_to_it() -> None:
    for phase in Phase:
        if phase.traits.exchanges:
            assert Phase.PAUSED in phase.traits.then
            assert phase in Phase.PAUSED.traits.then


def test_who_exchanges_holds_the_parameters_and_counts() -> None:
    for phase in Phase:
        traits = phase.traits
        if traits.exchanges:
            assert traits.holds_parameters
        if traits.holds_parameters:
            assert traits.counts_as_present
        if traits.ended:
            assert traits.exchanges
        assert traits.delays_the_end == (traits.takes_part and not traits.ended)


def test_a_card_names_a_phase_of_the_first_version_that_does_the_same() -> None:
    """Members of 3a5a91e know no `mixing`."""
    for phase in Phase:
        if phase.traits.card:
            said, own = traits_of(phase.traits.card), phase.traits
            assert (said.exchanges, said.holds_parameters) == (own.exchanges, own.holds_parameters)
    assert traits_of(Phase.MIXING.traits.card) is TABLE[Phase.BUDGET_SPENT]


@pytest.mark.parametrize("said", ["left", "", "dreaming"])
def test_nothing_is_assumed_of_a_phase_that_we_do_not_know(said: str) -> None:
    traits = traits_of(said)
    assert not (traits.exchanges or traits.holds_parameters or traits.counts_as_present)
    assert not (traits.ended or traits.takes_part)


def test_a_life_goes_where_the_table_lets_it_and_nowhere_else() -> None:
    for before in Phase:
        for after in set(Phase) - {before}:
            life = Life(lambda: 0.0)
            life.phase = before
            life.changed.clear()
            if after in before.traits.then:
                life.enter(after)
                assert (life.phase, life.changed.is_set()) == (after, True)
            else:
                with pytest.raises(LocalError, match=f"is {before}, and can't be {after} next"):
                    life.enter(after)
                assert (life.phase, life.changed.is_set()) == (before, False)


def test_only_a_phase_of_training_follows_the_trainer() -> None:
    for before in Phase:
        for said in get_args(TrainerPhase):
            life = Life(lambda: 0.0)
            life.phase = before
            life.follow(said)
            if before.traits.follows_trainer and said in ("training", "closing", "budget-spent"):
                assert life.phase == said
            else:
                assert life.phase is before
