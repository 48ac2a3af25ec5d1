"""Steps, windows, charges and time of the training loop."""

from __future__ import annotations

import math
import re
import threading
from typing import Any

import pytest
import torch

from tests.unit.training.clocks import Clock
from tests.unit.training.loops import NUM_PARAMS, mechanism_of, merge, swap, trainer_with
from xpeer.errors import LocalError
from xpeer.manifest import End
from xpeer.manifest.privacy import Privacy
from xpeer.manifest.round import Round
from xpeer.training import measuring
from xpeer.training.measuring import Evaluation


def test_run_takes_steps_windows_and_charges_each_step_once() -> None:
    trainer = trainer_with(end=End(steps=10))
    trainer.run(steps=7)
    assert (trainer.counters.step, trainer.counters.window, trainer.counters.tokens) == (7, 1, 700)
    trainer.run(steps=100)
    assert (trainer.counters.step, trainer.state) == (10, "closing")
    assert mechanism_of(trainer).charged()[:2] == (10, 10)


def test_where_charging_is_cheap_each_step_is_charged_before_it() -> None:
    trainer = trainer_with()
    mechanism_of(trainer).charge_s = 0.0
    trainer.run(steps=3)
    assert mechanism_of(trainer).calls == [("begin", 1)] * 3


def test_where_charging_takes_long_the_next_part_is_charged_during_this_one() -> None:
    trainer = trainer_with()
    mechanism_of(trainer).charge_s = 1e6
    trainer.run(steps=5)
    assert mechanism_of(trainer).calls == [
        ("begin", 1),  # nobody knows yet how long a step takes
        ("begin", 4), ("prepare", 4),
    ]  # fmt: skip
    trainer.stop()
    trainer.run()
    assert (trainer.counters.step, mechanism_of(trainer).charged()[:2]) == (9, (9, 9))


def test_a_spent_budget_ends_training_but_not_mixing() -> None:
    trainer, other = trainer_with(budget=6), trainer_with(seed=1)
    states: list[str] = []
    trainer.on_state = lambda: states.append(trainer.state)
    trainer.run(steps=100)
    assert trainer.counters.step == 6
    assert states[-1] == "budget-spent"
    swap(trainer, other, 1, 0)
    before = trainer.parameters.read()
    merge(trainer, 1)
    assert not torch.equal(trainer.parameters.read(), before)


def test_divergence_is_an_error() -> None:
    trainer = trainer_with(privacy=Privacy(mode="off"))
    mechanism_of(trainer).loss = lambda: float("nan")
    with pytest.raises(LocalError, match="diverged"):
        trainer.run(steps=1)


def test_under_privacy_divergence_is_seen_on_the_public_text_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A node that stops is seen by its partners, who choose the parameters: no loss of its own
    records, nor whether it is one, may make it stop.
    """
    monkeypatch.setattr("xpeer.training.measuring.SHARE", float("inf"))  # whatever time it takes
    trainer = trainer_with()
    mechanism_of(trainer).loss = lambda: float("nan")
    trainer.run(steps=4)
    assert trainer.counters.step == 4
    trainer.parameters.write(torch.full((NUM_PARAMS,), float("nan")))
    with pytest.raises(LocalError, match="diverged"):
        trainer.run(steps=8)


def test_windows_end_by_the_clock_too_and_charged_steps_carry_over() -> None:
    trainer = trainer_with(round=Round(window_steps=100, window_s=1e-9, fragments=3))
    mechanism_of(trainer).charge_s = 1e6
    trainer.run(steps=5)
    assert trainer.counters.window == 5
    assert mechanism_of(trainer).calls == [("begin", 1), ("begin", 99)]  # a window may be lost


def test_commands_are_served_while_training_resting_and_paused(clock: Clock) -> None:
    """A rest ends by the clock, which stands still then: only serving jobs lets this test end."""
    trainer, resting = trainer_with(throttle=0.5), threading.Event()
    mechanism_of(trainer).on_step = lambda: clock.advance(1.0)
    trainer.on_step = lambda rest_s: resting.set() if rest_s else None
    trainer.carry_out = lambda job: job()
    thread = threading.Thread(target=trainer.run)
    thread.start()
    try:
        assert resting.wait(20)
        for mode in ("pause", "train", "mix", "train"):
            done = threading.Event()

            def change(mode: Any = mode, done: threading.Event = done) -> None:
                trainer.set_mode(mode)
                done.set()

            trainer.submit(change)
            assert done.wait(20)
    finally:
        trainer.stop()
        thread.join(20)
    assert not thread.is_alive()


def test_blocked_time_is_what_the_ledger_takes(clock: Clock) -> None:
    trainer = trainer_with()
    mechanism = mechanism_of(trainer)
    original = mechanism.charge_until

    def slow(steps: int) -> int:
        clock.advance(0.5)
        return original(steps)

    mechanism.charge_until = slow  # type: ignore[method-assign]
    mechanism.on_step = lambda: clock.advance(2.0)
    trainer.run(steps=3)
    assert trainer.progress().seconds_blocked == 3 * 0.5
    assert trainer.progress().seconds_training == 3 * 2.0
    assert trainer.progress().seconds_here >= 3 * 2.5


def test_no_more_time_is_blocked_than_there_was(clock: Clock) -> None:
    """A wait counts as it was, though work that takes long beyond measure does not."""
    trainer = trainer_with()
    mechanism = mechanism_of(trainer)
    original, waits = mechanism.charge_until, iter((0.0, 0.0, 600.0))

    def slow(steps: int) -> int:
        clock.advance(next(waits))
        return original(steps)

    mechanism.charge_until = slow  # type: ignore[method-assign]
    mechanism.on_step = lambda: clock.advance(2.0)
    trainer.run(steps=3)
    progress = trainer.progress()
    assert progress.seconds_blocked == 600.0
    assert progress.seconds_here >= 600.0 + 3 * 2.0


def test_losses_that_cannot_be_measured_end_no_training(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(measuring, "SHARE", math.inf)
    trainer, works = trainer_with(), [True]

    def public() -> float:
        if not works[0]:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
        return 1.5

    trainer.measurements._evaluation = Evaluation(public=public)
    trainer.run(4)
    works[0] = False
    trainer.run(8)
    progress = trainer.progress()
    assert progress.step == 12
    seen = r"OutOfMemoryError in xpeer\.training\.measuring, line \d+"  # and no word of it
    assert re.fullmatch(seen, progress.loss_problem)
    assert (progress.loss_public, progress.loss_measured_step) == (1.5, 4)  # old, and said to be
    assert caplog.text.count("the loss can't be measured") == 1
    works[0] = True
    trainer.run(4)
    progress = trainer.progress()
    assert (progress.loss_problem, progress.loss_measured_step) == ("", 16)
