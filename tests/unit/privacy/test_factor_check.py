"""What layers' own autograd makes of noted factors, call by call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.privacy.models import adapted, gpt2, llama, record_losses, some_records
from xpeer.privacy import factor_check
from xpeer.privacy.clipping import BookKeepingEngine, MicrobatchEngine, trainable
from xpeer.privacy.factor_check import Factors

RECORDS, BOUND = 5, 0.05


class Twice(nn.Module):
    """A model that goes through its layers twice, so that each parameter has two calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner: Any = llama(tied=True)
        self.again = nn.Linear(16, 16)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Any:
        hidden = self.inner.model.embed_tokens(input_ids)
        hidden = hidden + torch.tanh(self.again(torch.tanh(self.again(hidden))))
        return self.inner(inputs_embeds=hidden, position_ids=position_ids)


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "llama": (lambda: llama(tied=False), 0),
    "llama-tied": (lambda: llama(tied=True), 1),
    "gpt2-tied-lora": (lambda: adapted(gpt2(tied=True)), 0),
    "twice": (Twice, 2),
}
"""Models, and how many calls have to wait for others at a time."""


@pytest.mark.parametrize("micro_batch", [2, 5])
@pytest.mark.parametrize("name", MODELS)
def test_norms_and_sums_are_plain_autograds(name: str, micro_batch: int) -> None:
    model, records = MODELS[name][0](), some_records(RECORDS)
    engine = BookKeepingEngine(model, record_losses, micro_batch=micro_batch)
    found, _ = watched(engine, model, records)
    sums = [torch.zeros_like(p) for p in trainable(model)]
    wanted = MicrobatchEngine(model, record_losses).accumulate(records, BOUND, sums)
    assert bool((wanted.norms > BOUND).any()), "something is clipped"
    torch.testing.assert_close(torch.cat(found.norms), wanted.norms, rtol=1e-4, atol=0)
    for one, two in zip(found.sums, sums, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_a_call_is_dropped_once_it_is_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a pass would need more than a step whose layers are computed again."""
    make, most = MODELS[name]
    model = make()
    engine = BookKeepingEngine(model, record_losses, micro_batch=RECORDS)
    waiting: list[int] = []
    real = factor_check._Gathering.take

    def take(self: Any, call: Any, batch: int) -> None:
        real(self, call, batch)
        waiting.append(len({id(c) for calls in self._waiting.values() for c in calls}))

    monkeypatch.setattr(factor_check._Gathering, "take", take)
    _, num_calls = watched(engine, model, some_records(RECORDS))
    assert len(waiting) == 2 * num_calls
    assert max(waiting) == most < num_calls


@pytest.mark.parametrize("known", ["embed_tokens", "norm"])
def test_passes_that_differ_are_noticed(known: str) -> None:
    """One that lacks a call that was counted, and one that has no call of a layer at all."""
    model: Any = llama(tied=True)
    engine, factors = BookKeepingEngine(model, record_losses, micro_batch=2), factors_of(model)
    engine.watch = factors.counting()
    sums = [torch.zeros_like(p) for p in trainable(model)]
    engine.accumulate(some_records(2), BOUND, sums)
    counted = factors._counts[0]
    weight = getattr(model.model, known).weight
    counted[id(weight)] += 1 if known == "embed_tokens" else -1
    engine.watch = factors.measuring()
    with pytest.raises(RuntimeError, match="called other layers"):
        engine.accumulate(some_records(2), BOUND, sums)


def factors_of(model: nn.Module) -> Factors:
    return Factors(trainable(model), BOUND)


def watched(engine: BookKeepingEngine, model: nn.Module, records: Tensor) -> tuple[Factors, int]:
    """What three passes find, and how many calls of layers one of them has."""
    factors, sums = factors_of(model), [torch.zeros_like(p) for p in trainable(model)]
    noted: list[Any] = []
    counting = factors.counting()
    real = counting.take

    def take(call: Any, batch: int) -> None:
        noted.append(call)
        real(call, batch)

    counting.take = take  # type: ignore[method-assign]
    engine.watch = counting
    engine.accumulate(records, BOUND, sums)
    for watch in (factors.measuring, factors.adding):
        engine.watch = watch()
        engine.accumulate(records, BOUND, sums)
    return factors, len(noted)
