"""The rule `gradient` in the training loop: a window's gradient waits for the partners'."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.unit.training.clocks import Clock
from tests.unit.training.loops import (
    NUM_PARAMS,
    NoJobs,
    Result,
    mechanism_of,
    merge,
    swap,
    trainer_with,
)
from xpeer.errors import PeerError, Reason
from xpeer.manifest import End, Optimiser
from xpeer.manifest.round import Round
from xpeer.training.loop import TrainingLoop


def gradient_trainer(seed: int, end: End | None = None, **changes: Any) -> TrainingLoop:
    rules = Round(rule="gradient", group=0, fragments=1, window_steps=2, **changes)
    optimiser = Optimiser(learning_rate=0.1, warmup_steps=0, schedule="constant")
    return trainer_with(seed=seed, round=rules, optimiser=optimiser, end=end or End())


def test_gradient_aggregation_is_one_step_on_the_mean_gradient() -> None:
    """Two peers at the same parameters, against AdamW on the mean of their gradients."""
    a, b = gradient_trainer(1, codec="float32"), gradient_trainer(1, codec="float32")
    reference = gradient_trainer(1)
    gradients = [torch.randn(NUM_PARAMS), torch.randn(NUM_PARAMS)]
    for trainer, gradient in zip((a, b), gradients, strict=True):
        with_gradient(trainer, gradient)
        trainer.run(steps=2)
        assert trainer.state == "training"  # and not another step before the others' gradients
        assert torch.equal(trainer.parameters.read(), reference.parameters.read())
    swap(a, b, 1, 0)
    for trainer in (a, b):
        merge(trainer, 1)
        trainer._finish_gradient()
    reference.parameters.write_gradients((gradients[0] + gradients[1]) / 2)
    for group in reference.learner.optimiser.param_groups:
        group["lr"] = 0.1
    reference.learner.optimiser.step()
    for trainer in (a, b):
        assert torch.allclose(trainer.parameters.read(), reference.parameters.read(), atol=1e-6)


def with_gradient(trainer: TrainingLoop, gradient: torch.Tensor) -> None:
    mechanism, plain = mechanism_of(trainer), mechanism_of(trainer).step_gradient

    def step_gradient() -> Result:
        result = plain()
        trainer.parameters.write_gradients(gradient)
        return result

    mechanism.step_gradient = step_gradient  # type: ignore[method-assign] # a fake of a fake


def test_a_peer_that_nobody_meets_steps_with_its_own_gradient(clock: Clock) -> None:
    trainer = gradient_trainer(1, deadline_s=3.0)
    trainer._jobs = NoJobs(clock)  # type: ignore[assignment]
    before = trainer.parameters.read()
    trainer.run(steps=3)
    moved = (trainer.parameters.read() - before).abs()
    assert torch.allclose(moved, torch.full_like(moved, 0.1), atol=1e-3)  # AdamW's first step
    assert trainer.timings.blocked_s == 3.0
    assert trainer.timings.here_s >= 3.0


def test_a_gradient_that_comes_late_leaves_the_next_windows_own_gradient(clock: Clock) -> None:
    a, b = (gradient_trainer(1, codec="float32", deadline_s=3.0) for _ in range(2))
    for trainer in (a, b):
        trainer._jobs = NoJobs(clock)  # type: ignore[assignment]
        with_gradient(trainer, torch.ones(NUM_PARAMS))
        trainer.run(steps=2)
    swap(a, b, 1, 0)
    a._finish_gradient()  # b was not there in time
    with_gradient(a, -torch.ones(NUM_PARAMS))
    a.run(steps=2)
    merge(a, 1)
    assert not a._gradients.averaged  # it is the last window's
    assert a.timings.blocked_s == 3.0
    a._finish_gradient()
    assert a.timings.blocked_s == 6.0
    gradient = a.parameters.parameters()[0].grad  # type: ignore[index]
    assert torch.equal(gradient, -torch.ones(NUM_PARAMS))


def test_gradients_that_a_donors_parameters_replace_are_charged_and_not_used() -> None:
    trainer = gradient_trainer(1, deadline_s=0.01)
    trainer.run(steps=3)
    assert trainer.counters.charges_used == 2  # the second window has one of its two gradients
    trainer.replace(torch.full((NUM_PARAMS,), 0.25), step=500)
    trainer.pacing.permits.captured()
    assert (trainer.counters.charges_used, trainer.pacing.permits.unsaved) == (2, 1)
    trainer.run(steps=3)
    assert trainer.counters.charges_used == 4
    assert mechanism_of(trainer).used == 6


def test_the_last_gradient_is_taken_before_the_end_is_told() -> None:
    trainer = gradient_trainer(1, deadline_s=0.01, end=End(steps=4))
    states: list[str] = []
    trainer.on_state = lambda: states.append(trainer.state)
    trainer.run(steps=100)
    assert states == ["closing"]
    assert mechanism_of(trainer).permitted == 0
    assert trainer.learner.optimiser.state[trainer.parameters.parameters()[0]]["step"] == 2  # type: ignore[index]


def test_a_gradient_is_shown_only_when_its_window_is_complete() -> None:
    trainer = gradient_trainer(1)
    trainer.run(steps=1)
    with pytest.raises(PeerError) as error:
        trainer.snapshot(1, 0, averaging=False)
    assert error.value.reason == Reason.NOT_READY
    assert trainer.snapshot(2, 0, averaging=True).values.numel() == NUM_PARAMS
    trainer.exchanges.drop(2)
    trainer.run(steps=1)
    assert trainer.snapshot(3, 0, averaging=False).values.numel() == 2 * NUM_PARAMS
