"""A long step is ended by a stop, a short one is finished; and a stuck trainer looks stuck."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.training.loops import mechanism_of, trainer_with
from xpeer.training import loop
from xpeer.training.loop import TrainingLoop
from xpeer.training.pulse import Pulse, StepAbandonedError


def stopped_in_a_step(trainer: TrainingLoop) -> list[int]:
    """Train until a stop in the middle of the third step; micro-batches of each step."""
    done: list[int] = []
    real = trainer.learner.mechanism.step_gradient

    def step() -> Any:
        result = real()  # uses up a charge first of all
        done.append(0)
        for micro_batch in range(4):
            if len(done) == 3 and micro_batch == 2:
                trainer.stop()
            trainer.pulse.micro_batch()
            done[-1] += 1
        return result

    trainer.learner.mechanism.step_gradient = step  # type: ignore[method-assign]
    trainer.run()
    return done


def test_a_step_that_ends_soon_is_finished() -> None:
    trainer = trainer_with()
    done = stopped_in_a_step(trainer)
    assert set(done) == {4}
    assert trainer.counters.step == len(done) >= 3


def test_a_long_step_is_abandoned_and_stays_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "SHORT_S", 0.0)
    trainer = trainer_with()
    before = trainer.parameters.read()
    assert stopped_in_a_step(trainer) == [4, 4, 2]
    assert trainer.counters.step == 2
    charged = mechanism_of(trainer).charged()
    assert (charged.used, charged.left) == (3, 0)
    assert not before.equal(trainer.parameters.read())


def test_work_grows_with_every_sign_of_life() -> None:
    pulse = Pulse()
    for sign in (pulse.beat, pulse.micro_batch, lambda: pulse.wrote(1, 2)):
        before = pulse.work
        sign()
        assert pulse.work > before
    pulse.end_step_within(-1.0)
    with pytest.raises(StepAbandonedError):
        pulse.micro_batch()
