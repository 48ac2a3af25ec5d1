"""The self-test of engines where the model computes in bfloat16. It must not become a rubber stamp:
each fault below is one that only bfloat16 shows, or that a coarse comparison would let pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.privacy.models import adapted, gpt2, llama, neox, qwen2, record_losses, some_records
from xpeer.errors import ConfigError
from xpeer.privacy import record_gradients
from xpeer.privacy.clipping import (
    BookKeepingEngine,
    Bound,
    Clipped,
    Engine,
    FunctionalEngine,
    MicrobatchEngine,
    trainable,
)
from xpeer.privacy.engines import Choice, choose_engine
from xpeer.privacy.layers import Outer
from xpeer.privacy.steps import Precision, Switchable

HALF = Precision("bfloat16", partial(torch.autocast, "cpu", torch.bfloat16))
MODELS: dict[str, Any] = {
    "llama": lambda: llama(tied=False),
    "llama-tied": lambda: llama(tied=True),
    "gpt2-tied": lambda: gpt2(tied=True),
    "neox": lambda: neox(tied=False),
    "qwen2-tied": lambda: qwen2(tied=True),
    "llama-lora": lambda: adapted(llama(tied=False)),
    "gpt2-tied-lora": lambda: adapted(gpt2(tied=True)),
}
ENGINES: list[Any] = [BookKeepingEngine, FunctionalEngine, MicrobatchEngine]


def no_time() -> float:
    return 0.0


def in_half(model: nn.Module) -> Switchable:
    losses = Switchable(record_losses)
    losses.precision = HALF
    return losses


def part_of(engine: Engine, model: nn.Module, records: Tensor, bounds: Tensor) -> float:
    """Norm of the sum."""
    sums = [torch.zeros_like(p) for p in trainable(model)]
    engine.accumulate(records, bounds, sums)
    assert all(total.dtype == torch.float32 for total in sums)
    return float(torch.cat([total.flatten() for total in sums]).double().norm())


@pytest.mark.parametrize("ratio", [0, 20])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_no_record_adds_more_than_the_norm(
    name: str, engine: Any, ratio: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither alone nor among others, whose bounds are too small to count."""
    if engine is FunctionalEngine and name in {"neox", "qwen2-tied"}:
        pytest.skip("vmap can't run it under autocast, and is refused")
    monkeypatch.setattr(record_gradients, "_WRITTEN_RATIO", ratio)
    model, records = MODELS[name](), some_records(4)
    made = engine(model, in_half(model))
    for i in range(4):
        bounds = torch.full((4,), 1e-9, dtype=torch.float64)
        bounds[i] = 0.01
        for norm in (
            part_of(made, model, records, bounds),
            part_of(made, model, records[i : i + 1], bounds[i : i + 1]),
        ):
            assert norm == pytest.approx(0.01, rel=1e-4)
            assert norm <= 0.01 * (1 + 1e-6)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", MODELS)
def test_right_engines_pass_in_half_precision(name: str) -> None:
    choice = chosen(MODELS[name]())
    assert choice.engine.name == "book-keeping"
    assert "refused book-keeping" not in choice.reason


def chosen(model: nn.Module, *candidates: Any) -> Choice:
    sample, losses = some_records()[:4], Switchable(record_losses)
    options: dict[str, Any] = {"clock": no_time, "precision": HALF}
    if candidates:
        options["candidates"] = [partial(make, model, losses) for make in candidates]
    choice = choose_engine(model, losses, sample, **options)
    assert losses.precision is HALF
    return choice


class ClipsTooLittle(MicrobatchEngine):
    """In bfloat16 alone, it takes a norm for 1% smaller, and clips to that."""

    name = "tampered"
    scale = 0.99

    def accumulate(self, records: Tensor, clip_norm: Bound, sums: Sequence[Tensor]) -> Clipped:
        low: Any = self._record_losses
        scale = self.scale if low.precision is HALF else 1.0
        bounds = torch.as_tensor(clip_norm, dtype=torch.float64) / scale
        told = super().accumulate(records, bounds, sums)
        return Clipped(told.losses, told.tokens, told.norms * scale)


def test_an_engine_that_clips_too_little_in_half_precision_is_refused() -> None:
    """By 1%, which bfloat16 alone could do to a norm."""
    choice = chosen(llama(tied=True), ClipsTooLittle)
    assert choice.engine.name == "microbatch"
    assert "a record adds 0.01 more than the clipping norm" in choice.reason


def test_an_engine_that_fails_in_half_precision_alone_is_refused() -> None:
    class Fails(MicrobatchEngine):
        name = "fails"

        def accumulate(self, records: Tensor, clip_norm: Bound, sums: Sequence[Tensor]) -> Clipped:
            low: Any = self._record_losses
            if low.precision is HALF:
                raise RuntimeError("not in bfloat16")
            return super().accumulate(records, clip_norm, sums)

    choice = chosen(llama(tied=True), Fails)
    assert "refused fails: RuntimeError: not in bfloat16" in choice.reason


def test_sums_of_other_factors_than_those_of_the_norms_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sums of factors that are rounded once more: wrong by 0.2%, and a coarse bound allows 25%."""
    real = Outer.add_weighted

    def rounded(self: Outer, factors: Tensor, out: Tensor) -> None:
        if self.cols.dtype == torch.bfloat16:
            weighted = (self.cols * factors[:, None, None].bfloat16()).float()
            real(Outer(self.rows, weighted), torch.ones_like(factors), out)
        else:
            real(self, factors, out)

    monkeypatch.setattr(record_gradients, "_WRITTEN_RATIO", 0)
    monkeypatch.setattr(Outer, "add_weighted", rounded)
    choice = chosen(llama(tied=True))
    assert choice.engine.name == "vmap"
    assert "refused book-keeping: " in choice.reason


def test_norms_of_factors_in_half_precision_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that are rounded to bfloat16 before they are added."""
    monkeypatch.setattr(record_gradients, "_WRITTEN_RATIO", 0)
    real = Outer.inner
    monkeypatch.setattr(Outer, "inner", lambda self, other: 0.99 * real(self, other))
    choice = chosen(llama(tied=True))
    assert "refused book-keeping: norms under-estimated by 0.005" in choice.reason


def test_a_model_that_is_not_finite_in_this_precision_is_refused() -> None:
    class Overflows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = llama(tied=True)

        def forward(self, input_ids: Tensor, position_ids: Tensor) -> Any:
            out: Any = self.inner(input_ids=input_ids, position_ids=position_ids)
            if torch.is_autocast_enabled("cpu"):
                out.logits = out.logits * float("inf")
            return out

    with pytest.raises(ConfigError, match="not finite on any record tried, in bfloat16") as e:
        chosen(Overflows().eval())
    assert "training.precision" in str(e.value)


def test_coupling_is_noticed_in_a_model_whose_values_are_half() -> None:
    """Such a model is never compared in float32."""

    class Averaging(nn.Module):
        def __init__(self, share: float) -> None:
            super().__init__()
            self.inner = llama(tied=True).bfloat16()
            self.share = share

        def forward(self, input_ids: Tensor, position_ids: Tensor) -> Any:
            out: Any = self.inner(input_ids=input_ids, position_ids=position_ids)
            out.logits = out.logits + self.share * out.logits.mean(0)
            return out

    with pytest.raises(ConfigError, match="influence"):
        chosen(Averaging(0.1).eval())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["llama-lora", "gpt2-tied-lora"])
def test_adapters_of_a_model_that_is_held_in_half_precision(name: str) -> None:
    model = MODELS[name]()
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    choice = chosen(model)
    assert choice.engine.name == "book-keeping"
    assert "refused book-keeping" not in choice.reason
    bounds = torch.tensor([0.01, 1e-9, 1e-9, 1e-9], dtype=torch.float64)
    norm = part_of(choice.engine, model, some_records(4), bounds)
    assert norm == pytest.approx(0.01, rel=1e-4)
