"""D23: a step that was interrupted is not taken for work: the throttle rests no longer for it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.unit.training.loops import trainer_with
from xpeer.training.loop import TrainingLoop

INTERRUPTED_S = 600.0


class Clock:
    """Time that passes only where the test says so; `xpeer` sees it as its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        for name in ("monotonic", "perf_counter"):
            monkeypatch.setattr(time, name, lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def throttled(clock: Clock, durations: list[float]) -> tuple[TrainingLoop, list[float]]:
    """A trainer at a tenth of its speed whose steps take so long; and the rests it takes."""
    trainer = trainer_with(throttle=0.1)
    taking, rests = iter(durations), []

    def step() -> Any:
        clock.now += next(taking)
        return real()

    def rested(rest_s: float) -> None:
        rests.append(rest_s)
        clock.now += rest_s  # as if it had rested
        for name in ("_serve_for", "_serve_until"):
            setattr(trainer, name, lambda *_a, **_k: None)

    real, trainer.learner.mechanism.step_gradient = (  # type: ignore[method-assign]
        trainer.learner.mechanism.step_gradient,
        step,
    )
    trainer.on_step = rested
    trainer.run(steps=len(durations))
    return trainer, rests


def test_an_interrupted_step_is_followed_by_a_usual_rest(clock: Clock) -> None:
    _, rests = throttled(clock, [0.2, 0.2, 0.2, 8.0, 0.2])
    assert rests[2] == pytest.approx(1.8)
    assert rests[3] <= 4 * 1.8 + 0.01, f"rested {rests[3]:.0f} s after a step that was stopped"
    assert rests[4] == pytest.approx(1.8)


@pytest.mark.parametrize("interrupted", range(5))
def test_whichever_step_is_interrupted(clock: Clock, interrupted: int) -> None:
    durations = [0.2] * 5
    durations[interrupted] += INTERRUPTED_S
    trainer, rests = throttled(clock, durations)
    assert max(rests) <= 4 * 1.8 + 0.01
    if interrupted:  # a run that ends by the seconds it trained; the first step is all we know
        assert trainer.counters.seconds <= 9 * 0.2 + 0.01
        assert trainer.progress().tokens_per_s > 300


def test_slow_steps_are_work_when_all_are_slow(clock: Clock) -> None:
    _, rests = throttled(clock, [30.0] * 4)
    assert rests[1:] == pytest.approx([270.0] * 3)


def test_an_interrupted_measurement_does_not_end_measuring(clock: Clock) -> None:
    """It is bounded to a share of the training time: ten minutes would count for hours."""
    from xpeer.training.measuring import Evaluation

    took = iter([0.01, 0.01, INTERRUPTED_S, *[0.01] * 1000])
    measured = []

    def public() -> float:
        clock.now += next(took)
        measured.append(clock.now)
        return 1.0

    trainer = trainer_with()
    trainer.measurements._evaluation = Evaluation(public, None)
    real = trainer.learner.mechanism.step_gradient

    def step() -> Any:
        clock.now += 1.0
        return real()

    trainer.learner.mechanism.step_gradient = step  # type: ignore[method-assign]
    trainer.run(steps=trainer.manifest.round.window_steps * 12)
    assert len(measured) >= 10


def test_a_suspended_machine_does_not_publish_a_slower_node() -> None:
    from xpeer_daemon.throughput import Throughput

    speed = Throughput(tokens_per_step=100)
    now, step = 0.0, 0
    for tick in range(4000):
        now, step = now + 0.1, tick
        if tick == 2000:
            now += INTERRUPTED_S
        speed.observe(step, now, 0.0)
    assert speed.published == pytest.approx(1000, rel=0.1)


async def test_status_says_that_it_rests(clock: Clock) -> None:
    from tests.unit.daemon.fakes import FakeNode
    from xpeer.status import Progress
    from xpeer.trainer.client import Progressed, TrainerProcess

    trainer = TrainerProcess(lambda _event: None)
    trainer._follow(Progressed("training", Progress(step=3, rest_s=20.0), 0))
    assert trainer.resting_s == pytest.approx(20.0)
    clock.now += 19.0
    assert trainer.resting_s == pytest.approx(1.0)
    clock.now += 19.0
    assert trainer.resting_s == 0.0
    trainer._follow(Progressed("training", Progress(step=3, rest_s=20.0), 0))
    fake = FakeNode()
    fake.supervisor.trainer = trainer
    (resting,) = [reason for reason in fake.node.reasons() if reason.code == "resting"]
    assert "resting for 20 s" in resting.text
