from __future__ import annotations

import math
import queue
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import msgspec
import pytest
import torch

from tests.factories import privacy_stamp
from tests.unit.training.clocks import Clock
from xpeer.accounts.budget import Charged
from xpeer.errors import LocalError, PeerError, Reason, TrainerError
from xpeer.forms import Codec, Form
from xpeer.identity import blake2b
from xpeer.manifest import End, Manifest, Optimiser, PublicText
from xpeer.manifest.model import Model
from xpeer.manifest.privacy import Privacy
from xpeer.manifest.round import Round
from xpeer.mixing import exchanges, in_flight
from xpeer.mixing.fragments import Fragments
from xpeer.mixing.in_flight import MAX_IN_FLIGHT
from xpeer.status import PrivacySpent
from xpeer.training import learner, loop, measuring, pacing, timings
from xpeer.training.loop import TrainingLoop
from xpeer.training.loop_parts import make_loop
from xpeer.training.measuring import Evaluation
from xpeer.training.schedule import Counters, learning_rate, planned_steps, share_done
from xpeer.update import Checked, CompressedUpdate, PeerUpdate, PrivateUpdate, RawUpdate

NUM_PARAMS = 640  # 10 lines


@dataclass(frozen=True)
class Result:
    loss: float | None
    tokens: int
    clip_norm: float | None = None


class Parameters:
    """One flat parameter."""

    def __init__(self, seed: int, num_fragments: int = 3) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weight = torch.nn.Parameter(torch.randn(NUM_PARAMS, generator=generator))
        self.num_params = NUM_PARAMS
        self.fragments = Fragments(NUM_PARAMS, num_fragments)

    def gather(self, fragment: int, out: torch.Tensor) -> torch.Tensor:
        return self.fragments.gather(self.weight.data, fragment, out)

    def add_(self, fragment: int, values: torch.Tensor, scale: float = 1.0) -> None:
        self.fragments.add_(self.weight.data, fragment, values, scale)

    def read(self, out: torch.Tensor | None = None) -> torch.Tensor:
        return self.weight.detach().clone() if out is None else out.copy_(self.weight.detach())

    def write(self, flat: torch.Tensor) -> None:
        with torch.no_grad():
            self.weight.copy_(flat)

    def read_gradients(self) -> torch.Tensor:
        assert self.weight.grad is not None
        return self.weight.grad.clone()

    def write_gradients(self, flat: torch.Tensor) -> None:
        self.weight.grad = flat.clone()

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        return [self.weight]

    @contextmanager
    def with_values(self, values: torch.Tensor) -> Iterator[None]:
        own = self.read()
        self.write(values)
        yield
        self.write(own)


class FakeMechanism:
    """Pulls towards a target, and logs what it was asked."""

    def __init__(self, parameters: Parameters, budget: int = 10**9) -> None:
        self.calls: list[tuple[str, int]] = []
        self.budget = budget
        self.permitted = 0
        self.prepared = 0
        self.used = 0
        self.charge_s = 0.0
        self.on_step: Callable[[], None] = lambda: None
        self.loss: Callable[[], float] = lambda: 1.0
        self._weight = parameters.weight

    def begin_window(self, steps: int) -> int:
        self.calls.append(("begin", steps))
        granted = self.prepared or min(steps, self.budget)
        self.budget -= 0 if self.prepared else granted
        self.prepared = 0
        self.permitted += granted
        return granted

    def prepare_window(self, steps: int) -> None:
        self.calls.append(("prepare", steps))
        self.prepared = min(steps, self.budget)
        self.budget -= self.prepared

    def step_gradient(self) -> Result:
        assert self.permitted > 0, "a step that was not charged"
        self.permitted -= 1
        self.used += 1
        self._weight.grad = self._weight.detach().sign()
        self.on_step()
        return Result(self.loss(), 100)

    def stamp(self, raw: RawUpdate) -> PrivateUpdate:
        return PrivateUpdate(raw.values, raw.step, privacy_stamp())

    def spent(self) -> PrivacySpent:
        return PrivacySpent()

    def charged(self) -> Charged:
        made = self.used + self.permitted + self.prepared
        return Charged(made, self.used, self.charge_s, 1000, self.permitted)


class NoJobs:
    """The loop's queue, into which nobody puts anything: all that passes is the time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def get_nowait(self) -> None:
        raise queue.Empty

    def get(self, timeout: float) -> None:
        self._clock.advance(timeout)
        raise queue.Empty


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What the loop and its meetings take for the time."""
    made = Clock()
    for module in (exchanges, learner, loop, measuring, pacing, in_flight, timings):
        monkeypatch.setattr(module, "time", made)
    return made


def manifest_with(**changes: Any) -> Manifest:
    text = "hello"
    base = Manifest(
        name="t",
        created_unix_s=0,
        model=Model(config={}, num_params=NUM_PARAMS, initial_digest=""),
        optimiser=Optimiser(learning_rate=1e-2, warmup_steps=0, schedule="constant"),
        round=Round(window_steps=4, fragments=3, codec="int8"),
        privacy=Privacy(noise_multiplier=1.0),
        public_text=PublicText(digest=blake2b(text.encode()).hex(), text=text),
    )
    return msgspec.structs.replace(base, **changes)


def trainer_with(
    seed: int = 0,
    budget: int = 10**9,
    throttle: float = 1.0,
    awaiting: bool = False,
    **changes: Any,
) -> TrainingLoop:
    manifest = manifest_with(**changes)
    parameters = Parameters(seed, manifest.round.fragments)
    return make_loop(
        manifest,
        parameters,
        cast(Any, FakeMechanism(parameters, budget)),  # it has no notes
        Evaluation(public=lambda: float(parameters.weight.detach().abs().mean())),
        throttle=throttle,
        awaiting=awaiting,
    )


def mechanism_of(trainer: TrainingLoop) -> FakeMechanism:
    mechanism: Any = trainer.learner.mechanism
    assert isinstance(mechanism, FakeMechanism)
    return mechanism


def swap(a: TrainingLoop, b: TrainingLoop, exchange_id: int, fragment: int) -> None:
    """Snapshot both, verify both; merging is the caller's."""
    updates = [taken(t, exchange_id, fragment) for t in (a, b)]
    for trainer, update in ((a, updates[1]), (b, updates[0])):
        verify(trainer, exchange_id, update)


def taken(trainer: TrainingLoop, meeting_id: int, fragment: int) -> CompressedUpdate:
    private = trainer.snapshot(meeting_id, fragment, averaging=False)
    return trainer.exchanges.compress(meeting_id, private)


def unbounded(trainer: TrainingLoop) -> None:
    """Unrelated models are farther apart than any that trained together."""
    for limits in trainer.exchanges._limits.values():
        for limit in limits:
            limit.limit = lambda *_, **__: math.inf  # type: ignore[method-assign]


def verify(trainer: TrainingLoop, meeting_id: int, update: CompressedUpdate) -> Checked:
    received = PeerUpdate(memoryview(update.payload), update.form, "")
    return trainer.exchanges.verify(meeting_id, 1, received)


def merge(trainer: TrainingLoop, meeting_id: int) -> None:
    trainer.exchanges.resolve(meeting_id, {1: 0.5})
    trainer.merge(meeting_id)


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


def test_merges_of_both_sides_keep_the_sum_while_training_goes_on() -> None:
    a, b = trainer_with(seed=1), trainer_with(seed=2)
    a.exchanges._limits[a.exchanges.rule][0].accepted(1e6)
    for exchange_id in range(6):
        fragment = exchange_id % 3
        swap(a, b, exchange_id, fragment)
        a.run(steps=2)
        total = a.parameters.read() + b.parameters.read()
        merge(a, exchange_id)
        merge(b, exchange_id)
        if a.counters.merges_clipped == b.counters.merges_clipped == 0:
            assert torch.allclose(a.parameters.read() + b.parameters.read(), total, atol=1e-5)
    assert a.progress().merges == 6
    assert a.progress().steps_late == 2.0
    assert b.progress().steps_late == 0.0


@pytest.mark.parametrize(
    ("codec", "left"),  # of a distance of 11: what the codec leaves
    [("int8", 0.3), ("bfloat16", 0.2), ("int4", 7.0)],
)
def test_mixing_alone_brings_peers_together(codec: Codec, left: float) -> None:
    round_ = Round(window_steps=4, fragments=3, codec=codec)
    a, b = trainer_with(seed=1, round=round_), trainer_with(seed=2, round=round_)
    # of one start: what is as far away as another random vector is clipped
    b.parameters.write(torch.lerp(a.parameters.read(), b.parameters.read(), 0.3))
    for exchange_id in range(30):
        swap(a, b, exchange_id, exchange_id % 3)
        merge(a, exchange_id)
        merge(b, exchange_id)
    assert float((a.parameters.read() - b.parameters.read()).norm()) < left
    distance = a.progress().consensus_distance
    assert distance is not None
    assert distance < 0.9  # smoothed


def test_a_dropped_exchange_is_not_merged_and_refused_afterwards() -> None:
    a, b = trainer_with(seed=1), trainer_with(seed=2)
    swap(a, b, 1, 0)
    before = a.parameters.read()
    a.exchanges.resolve(1, {1: 0.5})
    a.exchanges.drop(1)
    a.merge(1)
    assert torch.equal(a.parameters.read(), before)
    assert a.progress().merges == 0
    with pytest.raises(PeerError) as error:
        a.exchanges.resolve(1, {1: 0.5})
    assert error.value.reason == Reason.CLOSED
    a.exchanges.drop(99)


def test_in_flight_is_bounded_and_out_of_order_is_refused() -> None:
    trainer = trainer_with()
    for fragment in range(3):
        trainer.snapshot(fragment, fragment, averaging=False)
    with pytest.raises(PeerError) as error:
        trainer.snapshot(MAX_IN_FLIGHT, 0, averaging=False)
    assert error.value.reason == Reason.BUSY
    with pytest.raises(TrainerError, match="has its snapshot"):
        trainer.snapshot(0, 0, averaging=False)
    with pytest.raises(TrainerError, match="is certified, not sent"):
        trainer.exchanges.resolve(0, {1: 0.5})
    with pytest.raises(LocalError, match="fragment 3"):
        trainer.snapshot(0, 3, averaging=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"payload": b"\0"}, Reason.MALFORMED),
        ({"payload": b"\0" * 10_000}, Reason.OVERSIZE),
        ({"form": Form("float32", 256)}, Reason.WRONG_CODEC),
        ({"form": Form("int8", 10**12)}, Reason.WRONG_MODEL),
        ({"payload": b"\xff" * (2 * 2 + 256)}, Reason.NOT_FINITE),
    ],
)
def test_bad_payloads_are_refused(change: dict[str, Any], reason: str) -> None:
    trainer = trainer_with()
    update = taken(trainer, 1, 0)
    with pytest.raises(PeerError) as error:
        verify(trainer, 1, replace(update, **change))
    assert error.value.reason == reason


def test_a_joiner_waits_then_starts_afresh_at_its_donors_step() -> None:
    trainer = trainer_with(
        awaiting=True, optimiser=Optimiser(learning_rate=1e-2, warmup_steps=100, schedule="linear"),
        end=End(steps=1000),
    )  # fmt: skip
    trainer.run(steps=5)
    assert (trainer.counters.step, trainer.state) == (0, "mixing")
    with pytest.raises(PeerError) as error:
        trainer.snapshot(1, 0, averaging=False)
    assert error.value.reason == Reason.NOT_READY
    donor = torch.full((NUM_PARAMS,), 0.25)
    before, after = trainer.replace(donor, step=500)
    assert (trainer.counters.step, after) == (500, 0.25)
    assert before != after
    full = 1e-2 * (0.1 + 0.9 * 0.5)
    assert learning_rate(trainer.counters, trainer.manifest) == pytest.approx(full / 20)
    trainer.run(steps=5)
    assert trainer.counters.step == 505


def test_a_state_that_is_not_finite_is_refused_and_ours_stays() -> None:
    trainer = trainer_with()
    before = trainer.parameters.read()
    with pytest.raises(PeerError) as error:
        trainer.replace(torch.full((NUM_PARAMS,), float("nan")), 3)
    assert error.value.reason == Reason.NOT_FINITE
    assert torch.equal(trainer.parameters.read(), before)


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
    original = mechanism.begin_window

    def slow(steps: int) -> int:
        clock.advance(0.5)
        return original(steps)

    mechanism.begin_window = slow  # type: ignore[method-assign]
    mechanism.on_step = lambda: clock.advance(2.0)
    trainer.run(steps=3)
    assert trainer.progress().seconds_blocked == 3 * 0.5
    assert trainer.progress().seconds_training == 3 * 2.5


def test_snapshots_and_merges_are_timed_and_so_is_waiting_for_a_helper(clock: Clock) -> None:
    a, b = trainer_with(seed=1), trainer_with(seed=2)
    clock.tick = 1.0
    swap(a, b, 1, 0)
    assert a.progress().seconds_merge == 0.0
    merge(a, 1)
    progress = a.progress()
    assert min(progress.seconds_snapshot, progress.seconds_merge) > 0

    class Busy:
        """A lock that a helper lets go of after a while."""

        waits = 0

        def __enter__(self) -> None:
            self.waits += 1
            clock.advance(20.0)

        def __exit__(self, *error: object) -> None:
            pass

    busy, before = Busy(), a.progress().seconds_blocked
    a.exchanges._in_flight._lock = busy  # type: ignore[assignment]
    clock.tick = 0.0
    a.snapshot(2, 1, averaging=False)
    assert a.progress().seconds_blocked - before == 20.0 * busy.waits
    assert busy.waits


@pytest.mark.parametrize(
    ("end", "counters", "share"),
    [
        (End(), Counters(step=9), None),
        (End(steps=10), Counters(step=5), 0.5),
        (End(rounds=4), Counters(window=4), 1.0),
        (End(seconds=10.0), Counters(seconds=2.5), 0.25),
        (End(tokens=64 * 128 * 10), Counters(step=5, tokens=1), 0.5),
        (End(steps=10, seconds=10.0), Counters(step=1, seconds=9.0), 0.9),
    ],
)
def test_the_first_end_condition_counts(end: End, counters: Counters, share: float | None) -> None:
    assert share_done(counters, manifest_with(end=end, optimiser=Optimiser())) == share


def test_without_privacy_tokens_count_as_they_are() -> None:
    manifest = manifest_with(end=End(tokens=1000), privacy=Privacy(mode="off"))
    assert share_done(Counters(tokens=500), manifest) == 0.5


def test_planned_steps() -> None:
    assert planned_steps(manifest_with()) is None
    assert planned_steps(manifest_with(end=End(steps=7, rounds=5))) == 7
    assert planned_steps(manifest_with(end=End(rounds=5))) == 20
    assert planned_steps(manifest_with(end=End(seconds=5.0))) is None


@pytest.mark.parametrize(
    ("schedule", "half", "end"),
    [("constant", 1.0, 1.0), ("linear", 0.6, 0.2), ("cosine", 0.6, 0.2)],
)
def test_learning_rate_decays_to_its_final_share(schedule: Any, half: float, end: float) -> None:
    manifest = manifest_with(
        end=End(steps=100),
        optimiser=Optimiser(learning_rate=1.0, warmup_steps=10, schedule=schedule, final_rate=0.2),
    )
    rates = [learning_rate(Counters(step=s), manifest) for s in (0, 4, 50, 100)]
    assert rates[0] == pytest.approx(0.1, rel=0.01)
    assert rates[1] == pytest.approx(0.5, rel=0.05)
    assert rates[2:] == [pytest.approx(half), pytest.approx(end)]


# Aggregation rules in the loop


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


def test_three_peers_in_a_group_have_their_mean() -> None:
    peers = [trainer_with(seed=seed) for seed in range(3)]
    for peer in peers:
        unbounded(peer)
    indices = peers[0].exchanges.fragments.indices(0)
    mean = torch.stack([peer.parameters.read()[indices] for peer in peers]).mean(0)
    updates = [taken(peer, 1, 0) for peer in peers]
    for number, peer in enumerate(peers):
        others = [other for other in range(3) if other != number]
        for other in others:
            update = updates[other]
            peer.exchanges.verify(1, other, PeerUpdate(update.payload, update.form, ""))
        peer.exchanges.resolve(1, dict.fromkeys(others, 1 / 3))
        peer.merge(1)
        assert torch.allclose(peer.parameters.read()[indices], mean, atol=0.05)


def test_averaging_beside_an_outer_rule_moves_its_anchors() -> None:
    rules = Round(rule="noloco", fragments=1, codec="float32")
    a, b = trainer_with(seed=1, round=rules), trainer_with(seed=2, round=rules)
    updates = []
    for trainer in (a, b):
        private = trainer.snapshot(1, 0, averaging=True)
        updates.append(trainer.exchanges.compress(1, private))
    for trainer, update in ((a, updates[1]), (b, updates[0])):
        verify(trainer, 1, update)
        merge(trainer, 1)
        sent = trainer.snapshot(2, 0, averaging=False).values.view(2, -1)
        assert float(sent[0].norm()) < 1e-5  # theta - phi: training did nothing
        assert torch.allclose(sent[1], trainer.parameters.read(), atol=1e-5)


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
