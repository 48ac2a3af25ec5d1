"""Nothing that is remembered of a trainer paces the next one."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.unit.gossip.rigs import ROUND, FakeTrainer
from xpeer.gossip.pace import Pace
from xpeer.manifest.round import Round

GRADIENT = msgspec.structs.replace(ROUND, rule="gradient", group=0, fragments=1)


def trainer(**facts: int) -> Any:
    made = FakeTrainer()  # half of the trainer is never called
    for name, value in facts.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("next_one", "due"),
    [
        (trainer(epoch=7, step=401), False),
        (trainer(epoch=7, step=402), True),
        (trainer(epoch=8, step=400), True),  # resumed where the other one was
        (trainer(epoch=8, step=60), True),
        (trainer(epoch=8, step=0), True),
        (trainer(epoch=7, step=60), True),  # took over a member's parameters
    ],
)
def test_a_new_trainer_is_due_at_once(next_one: Any, due: bool) -> None:
    pace = Pace(ROUND)
    pace.began(trainer(epoch=7, step=400), 0.0)
    assert pace.due(next_one, 1.0) == due


def test_an_exchange_of_the_trainer_before_says_nothing_once_it_has_failed() -> None:
    pace = Pace(ROUND)
    first = pace.began(trainer(epoch=7, step=400), 0.0)
    pace.began(trainer(epoch=8, step=60), 1.0)
    pace.failed(first)  # it ends late
    assert not pace.due(trainer(epoch=8, step=60), 1.0)


def test_by_the_clock_the_pace_is_kept_across_trainers() -> None:
    rules: Round = msgspec.structs.replace(ROUND, window_s=10.0)
    pace = Pace(rules)
    pace.began(trainer(epoch=7, step=400), 0.0)
    assert not pace.due(trainer(epoch=7, step=400), 1.9)
    assert pace.due(trainer(epoch=7, step=400), 2.0)


def test_gradients_wait_for_the_next_window_of_the_trainer_there_is() -> None:
    pace = Pace(GRADIENT)
    assert not pace.due(trainer(epoch=7, window=9), 0.0)
    assert pace.due(trainer(epoch=7, window=10), 0.0)
    pace.began(trainer(epoch=7, window=10), 0.0)
    assert not pace.due(trainer(epoch=8, window=2), 0.0)  # its start
    assert pace.due(trainer(epoch=8, window=3), 0.0)
