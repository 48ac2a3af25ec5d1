"""`xpeer pause` and `resume` in every state that a node can be in."""

from __future__ import annotations

from typing import Any, cast, get_args

import pytest

from tests.unit.daemon.fakes import FakeNode
from xpeer.errors import LocalError, LocalTimeoutError, Reason
from xpeer.status import Progress, State
from xpeer.training.handle import TrainerProcess
from xpeer.training.setup import Mode
from xpeer_daemon.phases import EXCHANGING

NOTHING_TO_PAUSE = {"observing", "stopping"}
BEFORE = set(get_args(State)) - EXCHANGING - NOTHING_TO_PAUSE - {"paused"}


class FakeTrainer(TrainerProcess):
    """Does what it is told, and says so."""

    def __init__(self, fake: FakeNode) -> None:
        super().__init__(lambda _event: None)
        self.text_problem = ""
        self.orders: list[str] = []
        self.fails = False
        self._fake = fake

    async def run(self, mode: Mode) -> None:
        if self.fails:
            raise LocalTimeoutError("the trainer does not answer", "wait")
        self.orders.append(mode)
        if mode == "pause":
            self._fake.node.follow_trainer("paused", Progress())


def in_state(state: str) -> tuple[FakeNode, FakeTrainer]:
    fake = FakeNode("b")
    trainer = FakeTrainer(fake)
    fake.supervisor.trainer = cast(Any, trainer)
    if state == "mixing":
        trainer.text_problem = "it is not mounted"
    fake.node.enter(cast(State, state))
    return fake, trainer


@pytest.mark.parametrize("state", sorted(EXCHANGING))
async def test_whoever_exchanges_stops_and_goes_on_where_it_was(state: str) -> None:
    fake, trainer = in_state(state)
    assert await fake.node.pause() == "paused"
    assert (fake.node.state, fake.node.objection()) == ("paused", Reason.PAUSED)
    assert "paused" in fake.codes
    assert await fake.node.pause() == "paused"  # twice is once
    assert await fake.node.resume() == state
    assert (fake.node.state, fake.node.objection()) == (state, None)
    assert trainer.orders == ["pause", "train"]
    assert not fake.node.paused


@pytest.mark.parametrize("state", sorted(BEFORE))
async def test_whoever_has_not_begun_pauses_then(state: str) -> None:
    fake, trainer = in_state(state)
    assert await fake.node.pause() == state
    assert fake.node.paused
    assert trainer.orders == []
    assert await fake.node.resume() == state
    assert not fake.node.paused


@pytest.mark.parametrize("state", sorted(NOTHING_TO_PAUSE))
async def test_where_there_is_nothing_to_pause_that_is_an_error(state: str) -> None:
    fake, _ = in_state(state)
    with pytest.raises(LocalError, match=f"nothing to pause: this node is {state}"):
        await fake.node.pause()
    assert (fake.node.state, fake.node.paused) == (state, False)


@pytest.mark.parametrize("state", sorted(EXCHANGING))
async def test_a_trainer_that_is_being_restarted_comes_back_paused(state: str) -> None:
    fake, _ = in_state(state)
    fake.supervisor.trainer = cast(Any, None)
    assert await fake.node.pause() == "paused"
    assert fake.node.objection() == Reason.PAUSED
    assert await fake.node.resume() == state


@pytest.mark.parametrize("state", sorted(EXCHANGING - {"finished"}))
@pytest.mark.parametrize("told", [False, True], ids=["silent", "says paused"])
async def test_resumed_while_a_trainer_starts_paused_it_goes_on(state: str, told: bool) -> None:
    fake, trainer = in_state(state)
    fake.supervisor.trainer = cast(Any, None)
    await fake.node.pause()
    await fake.node.resume()
    fake.supervisor.trainer = cast(Any, trainer)  # its setup was made in between
    if told:
        fake.node.follow_trainer("paused", Progress())
    await fake.node.instruct(trainer)
    assert trainer.orders == ["train"]
    assert fake.node.state == state


async def test_paused_while_a_trainer_starts_it_is_told() -> None:
    fake, trainer = in_state("closing")
    fake.supervisor.trainer = cast(Any, None)
    await fake.node.pause()
    fake.supervisor.trainer = cast(Any, trainer)
    await fake.node.instruct(trainer)
    assert (trainer.orders, fake.node.state) == (["pause"], "paused")


@pytest.mark.parametrize("state", sorted(EXCHANGING))
async def test_a_trainer_that_does_not_answer_changes_nothing(state: str) -> None:
    fake, trainer = in_state(state)
    trainer.fails = True
    with pytest.raises(LocalTimeoutError):
        await fake.node.pause()
    assert (fake.node.state, fake.node.paused) == (state, False)
    trainer.fails = False
    await fake.node.pause()
    trainer.fails = True
    with pytest.raises(LocalTimeoutError):
        await fake.node.resume()
    assert (fake.node.state, fake.node.paused) == ("paused", True)


async def test_the_states_are_all_there_are() -> None:
    assert EXCHANGING | BEFORE | NOTHING_TO_PAUSE | {"paused"} == set(get_args(State))
    assert "closing" in EXCHANGING
    assert "joining" in BEFORE
