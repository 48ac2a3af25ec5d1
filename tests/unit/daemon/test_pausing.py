"""`xpeer pause` and `resume` in every state that a node can be in."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from msgspec import structs

from tests.unit.daemon.fakes import FakeNode
from xpeer.errors import LocalError, LocalTimeoutError, Reason
from xpeer.phase import Order, Phase
from xpeer.status import Progress
from xpeer.trainer.client import TrainerProcess

EXCHANGING = {phase for phase in Phase if phase.traits.exchanges}
NOTHING_TO_PAUSE = {Phase.OBSERVING, Phase.STOPPING}
BEFORE = set(Phase) - EXCHANGING - NOTHING_TO_PAUSE - {Phase.PAUSED}


class FakeTrainer(TrainerProcess):
    """Does what it is told, and says so."""

    def __init__(self, fake: FakeNode) -> None:
        super().__init__(lambda _event: None)
        self.orders: list[str] = []
        self.fails = False
        self._fake = fake

    async def run(self, mode: Order) -> None:
        if self.fails:
            raise LocalTimeoutError("the trainer does not answer", "wait")
        self.orders.append(mode)
        if mode == "pause":
            self._fake.node.follow_trainer("paused", Progress())


def in_state(state: Phase) -> tuple[FakeNode, FakeTrainer]:
    fake = FakeNode("b")
    trainer = FakeTrainer(fake)
    fake.supervisor.trainer = cast(Any, trainer)
    if state == "mixing":
        trainer.facts = structs.replace(trainer.facts, text_problem="it is not mounted")
    fake.is_in(state)
    return fake, trainer


@pytest.mark.parametrize("state", sorted(EXCHANGING))
async def test_whoever_exchanges_stops_and_goes_on_where_it_was(state: Phase) -> None:
    fake, trainer = in_state(state)
    assert await fake.node.pause() == "paused"
    assert (fake.node.phase, fake.view.idle_reason()) == ("paused", Reason.PAUSED)
    assert "paused" in fake.codes
    assert await fake.node.pause() == "paused"  # twice is once
    assert await fake.node.resume() == state
    assert (fake.node.phase, fake.view.idle_reason()) == (state, None)
    assert trainer.orders == ["pause", state.traits.order]
    assert not fake.life.pause_wanted


@pytest.mark.parametrize("state", sorted(BEFORE))
async def test_whoever_has_not_begun_pauses_then(state: Phase) -> None:
    fake, trainer = in_state(state)
    assert await fake.node.pause() == state
    assert fake.life.pause_wanted
    assert trainer.orders == []
    assert await fake.node.resume() == state
    assert not fake.life.pause_wanted


@pytest.mark.parametrize("state", sorted(NOTHING_TO_PAUSE))
async def test_where_there_is_nothing_to_pause_that_is_an_error(state: Phase) -> None:
    fake, _ = in_state(state)
    with pytest.raises(LocalError, match=f"nothing to pause: this node is {state}"):
        await fake.node.pause()
    assert (fake.node.phase, fake.life.pause_wanted) == (state, False)


@pytest.mark.parametrize("state", sorted(EXCHANGING))
async def test_a_trainer_that_is_being_restarted_comes_back_paused(state: Phase) -> None:
    fake, _ = in_state(state)
    fake.supervisor.trainer = cast(Any, None)
    assert await fake.node.pause() == "paused"
    assert fake.view.idle_reason() == Reason.PAUSED
    assert await fake.node.resume() == state


@pytest.mark.parametrize("state", sorted(EXCHANGING - {"finished"}))
@pytest.mark.parametrize("told", [False, True], ids=["silent", "says paused"])
async def test_resumed_while_a_trainer_starts_paused_it_goes_on(state: Phase, told: bool) -> None:
    fake, trainer = in_state(state)
    fake.supervisor.trainer = cast(Any, None)
    await fake.node.pause()
    await fake.node.resume()
    fake.supervisor.trainer = cast(Any, trainer)  # its setup was made in between
    if told:
        fake.node.follow_trainer("paused", Progress())
    await fake.node.instruct(trainer)
    assert trainer.orders == ["train"]
    assert fake.node.phase == state


async def test_paused_while_a_trainer_starts_it_is_told() -> None:
    fake, trainer = in_state(Phase.CLOSING)
    fake.supervisor.trainer = cast(Any, None)
    await fake.node.pause()
    fake.supervisor.trainer = cast(Any, trainer)
    await fake.node.instruct(trainer)
    assert (trainer.orders, fake.node.phase) == (["pause"], "paused")


async def test_what_a_trainer_says_that_was_started_before_the_pause_ends_no_pause() -> None:
    fake, trainer = in_state(Phase.TRAINING)
    fake.supervisor.trainer = cast(Any, None)
    await fake.node.pause()
    fake.supervisor.trainer = cast(Any, trainer)  # its setup was made before: it trains
    fake.node.follow_trainer("training", Progress(step=1))
    assert (fake.node.phase, fake.view.idle_reason()) == ("paused", Reason.PAUSED)
    await fake.node.instruct(trainer)
    assert (trainer.orders, fake.node.phase) == (["pause"], "paused")


async def test_a_budget_that_ends_before_the_node_has_begun_is_seen() -> None:
    fake, trainer = in_state(Phase.WAITING)

    async def ends_at_once(mode: Order) -> None:
        trainer.state = "budget-spent"
        fake.node.follow_trainer("budget-spent", Progress(step=9))

    trainer.run = ends_at_once  # type: ignore[method-assign]
    await fake.node.begin(trainer)
    assert fake.node.phase == "budget-spent"
    assert "budget-spent" in fake.codes


@pytest.mark.parametrize("state", sorted(EXCHANGING))
async def test_a_trainer_that_does_not_answer_changes_nothing(state: Phase) -> None:
    fake, trainer = in_state(state)
    trainer.fails = True
    with pytest.raises(LocalTimeoutError):
        await fake.node.pause()
    assert (fake.node.phase, fake.life.pause_wanted) == (state, False)
    trainer.fails = False
    await fake.node.pause()
    trainer.fails = True
    with pytest.raises(LocalTimeoutError):
        await fake.node.resume()
    assert (fake.node.phase, fake.life.pause_wanted) == ("paused", True)


async def test_the_states_are_all_there_are() -> None:
    assert EXCHANGING | BEFORE | NOTHING_TO_PAUSE | {Phase.PAUSED} == set(Phase)
    assert "closing" in EXCHANGING
    assert "joining" in BEFORE


class Interrupted(FakeTrainer):
    """Before it does what it is told first, the operator pauses the node."""

    pausing: asyncio.Task[Phase] | None = None

    async def run(self, mode: Order) -> None:
        if self.pausing is None:
            self.pausing = asyncio.create_task(self._fake.node.pause())
            await asyncio.sleep(0)  # it has begun
        await super().run(mode)


@pytest.mark.parametrize("begins", [True, False], ids=["begin", "resume"])
async def test_paused_while_it_begins_or_goes_on_it_is_paused(begins: bool) -> None:
    fake, _ = in_state(Phase.WAITING if begins else Phase.PAUSED)
    trainer = Interrupted(fake)
    fake.supervisor.trainer = cast(Any, trainer)
    if begins:
        await fake.node.begin(trainer)
    else:
        fake.life.interrupted, fake.life.pause_wanted = Phase.TRAINING, True
        await fake.node.resume()
    assert trainer.pausing is not None
    assert await trainer.pausing == "paused"
    assert (fake.node.phase, fake.life.pause_wanted) == ("paused", True)
    assert trainer.orders == ["train", "pause"]
