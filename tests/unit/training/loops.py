"""A training loop whose model is one parameter, and whose mechanism logs what it was asked."""

from __future__ import annotations

import math
import queue
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import msgspec
import torch

from tests.factories import privacy_stamp
from tests.unit.training.clocks import Clock
from xpeer.accounts.budget import Charged
from xpeer.identity import blake2b
from xpeer.manifest import Manifest, Optimiser, PublicText
from xpeer.manifest.model import Model
from xpeer.manifest.privacy import Privacy
from xpeer.manifest.round import Round
from xpeer.mixing.fragments import Fragments
from xpeer.status import PrivacySpent
from xpeer.training.loop import TrainingLoop
from xpeer.training.loop_parts import make_loop
from xpeer.training.measuring import Evaluation
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

    def charge_until(self, steps: int) -> int:
        self.calls.append(("begin", steps))
        granted = self.prepared or min(steps, self.budget)
        self.budget -= 0 if self.prepared else granted
        self.prepared = 0
        self.permitted += granted
        return granted

    def charge_ahead(self, steps: int) -> None:
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
