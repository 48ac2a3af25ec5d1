from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.opacus_reference import clipped_by_opacus
from tests.unit.privacy.models import (
    FILL,
    LENGTH,
    adapted,
    by_autograd,
    careless_losses,
    gpt2,
    llama,
    mixtral,
    neox,
    opt,
    qwen2,
    record_losses,
    some_records,
)
from xpeer.errors import ConfigError
from xpeer.privacy import record_gradients
from xpeer.privacy.clipping import (
    BookKeepingEngine,
    Bound,
    Clipped,
    Engine,
    FunctionalEngine,
    MicrobatchEngine,
    clip_factors,
    trainable,
)
from xpeer.privacy.engines import choose_engine, sample_of
from xpeer.privacy.record_gradients import squared_norms

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: llama(tied=False),
    "llama-tied": lambda: llama(tied=True),
    "llama-bias": lambda: llama(tied=False, attention_bias=True, mlp_bias=True),
    "gpt2": lambda: gpt2(tied=False),
    "gpt2-tied": lambda: gpt2(tied=True),
    "neox": lambda: neox(tied=False),
    "neox-tied": lambda: neox(tied=True),
    "qwen2": lambda: qwen2(tied=False),
    "qwen2-tied": lambda: qwen2(tied=True),
    "llama-lora": lambda: adapted(llama(tied=False)),
    "llama-tied-lora": lambda: adapted(llama(tied=True)),
    "llama-lora-b": lambda: adapted(llama(tied=False), train="B"),
    "gpt2-tied-lora-b": lambda: adapted(gpt2(tied=True), train="B"),
    "gpt2-lora": lambda: adapted(gpt2(tied=False)),
    "gpt2-tied-lora": lambda: adapted(gpt2(tied=True)),
    "neox-lora": lambda: adapted(neox(tied=False)),
    "neox-tied-lora": lambda: adapted(neox(tied=True)),
    "qwen2-tied-lora": lambda: adapted(qwen2(tied=True)),
}
ENGINES: list[Any] = [BookKeepingEngine, FunctionalEngine, MicrobatchEngine]


def run(engine: Engine, model: nn.Module, records: Tensor, clip_norm: Bound) -> Any:
    sums = [torch.zeros_like(p) for p in trainable(model)]
    return engine.accumulate(records, clip_norm, sums), sums


def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    error = sum(float((x - y).square().sum()) for x, y in zip(a, b, strict=True))
    return float((error / sum(float(x.square().sum()) for x in a)) ** 0.5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_equals_autograd_record_by_record(name: str, engine: Any) -> None:
    model, records = MODELS[name](), some_records()
    norms, _ = by_autograd(model, records, 1.0)
    clip_norm = float(norms.median())  # some are clipped, some are not
    norms, sums = by_autograd(model, records, clip_norm)
    told, got = run(engine(model, record_losses), model, records, clip_norm)
    assert distance(sums, got) < 1e-5
    torch.testing.assert_close(told.norms.float(), norms, rtol=1e-5, atol=0)
    assert told.tokens.tolist() == [11, 6, 11, 11, 1, 11, 11]
    losses, _ = record_losses(model, records)
    torch.testing.assert_close(told.losses, losses)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_opacus_finds_the_same_norms_and_sums(name: str, engine: Any) -> None:
    model, records = MODELS[name](), some_records()
    clip_norm = float(by_autograd(model, records, 1.0)[0].median())
    norms, sums = clipped_by_opacus(model, record_losses, records, clip_norm)
    told, got = run(engine(model, record_losses), model, records, clip_norm)
    assert distance(sums, got) < 1e-5
    torch.testing.assert_close(told.norms.float(), norms, rtol=1e-5, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_each_record_may_have_a_bound_of_its_own(engine: Any) -> None:
    model, records = llama(tied=True), some_records()
    bounds = torch.linspace(0.1, 3.0, len(records)).double()
    parts = [by_autograd(model, r[None], float(b))[1] for r, b in zip(records, bounds, strict=True)]
    sums = [torch.stack(each).sum(0) for each in zip(*parts, strict=True)]
    made = engine(model, record_losses)
    assert distance(sums, run(made, model, records, bounds)[1]) < 1e-5


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2-tied", "neox-tied", "llama-lora",
                                  "llama-lora-b"])  # fmt: skip
def test_norms_from_inner_products_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_gradients, "_WRITTEN_RATIO", 0)
    model, records = MODELS[name](), some_records()
    norms, sums = by_autograd(model, records, 0.5)
    told, got = run(BookKeepingEngine(model, record_losses), model, records, 0.5)
    assert distance(sums, got) < 1e-5
    torch.testing.assert_close(told.norms.float(), norms, rtol=1e-5, atol=0)


def test_a_row_that_an_embedding_leaves_out() -> None:
    model: Any = llama(tied=True)
    model.get_input_embeddings().padding_idx = int(some_records()[0, 0])
    norms, sums = by_autograd(model, some_records(), 0.5)
    told, got = run(BookKeepingEngine(model, record_losses), model, some_records(), 0.5)
    assert distance(sums, got) < 1e-5
    torch.testing.assert_close(told.norms.float(), norms, rtol=1e-5, atol=0)


CANCELLING = 128


class Cancelling(nn.Module):
    """The two halves of a record all but cancel: what a partner's parameters might bring about."""

    def __init__(self, left: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(352, 352, bias=False)
        self.vectors = torch.rand(256, 352) + 0.5
        self.weights = torch.cat([torch.ones(CANCELLING // 2), -torch.ones(CANCELLING // 2) - left])
        self.slopes = torch.rand(CANCELLING // 2, 352).repeat(2, 1) + 0.5

    def losses(self, _model: nn.Module, records: Tensor) -> tuple[Tensor, Tensor]:
        out = self.inner(self.vectors[records]) * self.slopes * self.weights[:, None]
        return out.sum((1, 2)), torch.ones(len(records), dtype=torch.int64)


@pytest.mark.parametrize("left", [1e-3, 1e-4, 1e-5, 1e-6])
def test_a_gradient_that_all_but_cancels_is_clipped(
    left: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_gradients, "_WRITTEN_RATIO", 0)
    model = Cancelling(left)
    record = torch.randint(0, 256, (1, CANCELLING // 2)).repeat(1, 2)
    _, free = run(MicrobatchEngine(model, model.losses), model, record, 1e9)
    bound = float(free[0].norm()) / 100
    _, (got,) = run(BookKeepingEngine(model, model.losses), model, record, bound)
    assert 0 < float(got.norm()) <= bound * 1.01


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 100])
def test_no_record_is_left_out_or_counted_twice(micro_batch: int) -> None:
    model, records = llama(tied=True), some_records()
    _, sums = by_autograd(model, records, 0.5)
    for engine in (BookKeepingEngine, FunctionalEngine):
        made = engine(model, record_losses, micro_batch=micro_batch)
        assert distance(sums, run(made, model, records, 0.5)[1]) < 1e-5


def test_passes_are_nearly_of_the_same_size() -> None:
    """A last pass of one record would take nearly as long as one of all."""
    sizes: list[int] = []

    def losses(model: nn.Module, records: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(records))
        return record_losses(model, records)

    model = llama(tied=True)
    run(BookKeepingEngine(model, losses, micro_batch=8), model, some_records(9), 0.5)
    assert sizes == [5, 4]


def test_memory_bounds_the_micro_batch() -> None:
    model = llama(tied=False)
    sizes = []
    for memory_bytes in (1, 300_000, 1 << 30):
        engine = BookKeepingEngine(model, record_losses, memory_bytes=memory_bytes)
        run(engine, model, some_records(), 1.0)
        sizes.append(engine.micro_batch)
    assert sizes[0] == 1
    assert sizes[0] < sizes[1] < sizes[2]


@pytest.mark.parametrize("engine", ENGINES)
def test_an_empty_batch_adds_nothing(engine: Any) -> None:
    model = llama(tied=False)
    told, got = run(engine(model, record_losses), model, some_records()[:0], 1.0)
    assert len(told.norms) == len(told.losses) == len(told.tokens) == 0
    assert all(float(total.abs().sum()) == 0 for total in got)


@pytest.mark.parametrize("engine", ENGINES)
def test_frozen_parameters_are_left_alone(engine: Any) -> None:
    model = llama(tied=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "q_proj" in name or "down_proj" in name
    _, sums = by_autograd(model, some_records(), 0.1)
    _, got = run(engine(model, record_losses), model, some_records(), 0.1)
    assert len(got) == 4
    assert distance(sums, got) < 1e-5
    _, theirs = clipped_by_opacus(model, record_losses, some_records(), 0.1)
    assert distance(theirs, got) < 1e-5


class Fragile(nn.Module):
    """Its gradient is infinite for records that begin with token 5."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = llama(tied=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Any:
        out: Any = self.inner(input_ids=input_ids, position_ids=position_ids)
        bad = (input_ids[:, :1] == 5).unsqueeze(2)
        out.logits = out.logits * torch.where(bad, float("inf"), 1.0)
        return out


@pytest.mark.parametrize("engine", ENGINES)
def test_records_without_finite_gradients_count_as_zero(engine: Any) -> None:
    model, records = Fragile().eval(), some_records()
    records[:, 0] = 1
    _, sums = by_autograd(model, records[[0, 1, 2, 4, 6]], 0.5)
    records[3, 0] = records[5, 0] = 5
    told, got = run(engine(model, record_losses), model, records, 0.5)
    assert distance(sums, got) < 1e-5
    assert torch.isfinite(told.norms).tolist() == [True, True, True, False, True, False, True]


def test_factors_never_let_a_record_exceed_the_norm() -> None:
    norms = torch.tensor([0.0, 1e-30, 0.5, 1.0, 3.0, 1e30, float("inf"), float("nan")]).double()
    factors = clip_factors(norms, 1.0)
    assert torch.all(norms[:6] * factors[:6] <= 1.0)
    assert factors.tolist()[:3] == [1.0, 1.0, 1.0]
    assert factors.tolist()[6:] == [0.0, 0.0]


@pytest.mark.parametrize("shape", [(2, 7), (3, 40, 100), (2, 500_000)])
def test_norms_of_large_gradients_are_not_too_small(shape: tuple[int, ...]) -> None:
    gradients = torch.full(shape, 1e-3)  # float32's own sum is 3e-4 too small for the largest
    exact = gradients.flatten(1).double().square().sum(1)
    torch.testing.assert_close(squared_norms(gradients), exact, rtol=5e-6, atol=0)


def no_time() -> float:
    """A clock by which all engines are alike, so that their order decides."""
    return 0.0


@pytest.mark.parametrize("name", MODELS)
def test_the_fast_engine_is_chosen_where_it_is_right(name: str) -> None:
    sample = sample_of(some_records())
    choice = choose_engine(MODELS[name](), record_losses, sample, clock=no_time)
    assert choice.engine.name == "book-keeping"
    assert choice.reason.startswith("8 records take book-keeping 0 ms, vmap 0 ms")
    assert "refused" not in choice.reason


def test_the_fastest_right_engine_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is only a little faster than an earlier one is not."""
    model, now = llama(tied=True), [0.0]

    class Timed(MicrobatchEngine):
        def __init__(self, name: str, seconds: float, **wrong: float) -> None:
            super().__init__(model, record_losses)
            self.name, self.seconds = name, seconds
            self.scale = wrong.get("sums", 1.0)

        def accumulate(self, records: Tensor, clip_norm: Bound, sums: Sequence[Tensor]) -> Clipped:
            now[0] += self.seconds
            told = super().accumulate(records, clip_norm, sums)
            for total in sums:
                total.mul_(self.scale)
            return told

    def choice(*candidates: Callable[[], Engine]) -> str:
        return choose_engine(
            model, record_losses, some_records()[:4], candidates=candidates, clock=lambda: now[0]
        ).engine.name

    assert choice(lambda: Timed("a", 3.0), lambda: Timed("b", 2.0)) == "microbatch"  # needs 0 s
    reference = Timed("one", 9.0)
    monkeypatch.setattr("xpeer.privacy.engine_check.MicrobatchEngine", lambda *_: reference)
    assert choice(lambda: Timed("a", 3.0), lambda: Timed("b", 2.0)) == "b"
    assert choice(lambda: Timed("a", 3.0), lambda: Timed("b", 2.9)) == "a"
    assert choice(lambda: Timed("wrong", 0.1, sums=1.01), lambda: Timed("b", 2.0)) == "b"
    assert choice(lambda: Timed("a", 99.0)) == "one"


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("make", [mixtral, opt])
def test_models_that_book_keeping_cannot_take_apart(make: Callable[[], nn.Module]) -> None:
    model, records = make().train(), some_records()
    choice = choose_engine(model, record_losses, sample_of(records), clock=no_time)
    assert choice.engine.name == "vmap"
    assert "refused book-keeping: " in choice.reason
    _, sums = by_autograd(model, records, 0.5)
    assert distance(sums, run(choice.engine, model, records, 0.5)[1]) < 1e-5


def test_an_engine_that_fails_in_training_mode_is_refused() -> None:
    model = llama(tied=True).train()

    class Quiet(MicrobatchEngine):
        name = "quiet"

        def accumulate(self, records: Tensor, clip_norm: Bound, sums: Sequence[Tensor]) -> Clipped:
            if model.training:
                raise RuntimeError("not in training")
            return super().accumulate(records, clip_norm, sums)

    candidates = [lambda: Quiet(model, record_losses)]
    choice = choose_engine(model, record_losses, some_records()[:4], candidates=candidates)
    assert choice.engine.name == "microbatch"
    assert "refused quiet: RuntimeError: not in training" in choice.reason


def test_one_record_at_a_time_always_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Engine:
        raise RuntimeError("not here")

    monkeypatch.setattr("xpeer.privacy.engines.BookKeepingEngine", fails)
    monkeypatch.setattr("xpeer.privacy.engines.FunctionalEngine", fails)
    model = llama(tied=True)
    choice = choose_engine(model, record_losses, some_records()[:4], clock=no_time)
    assert choice.engine.name == "microbatch"
    assert choice.reason.startswith("no other is exact for this model; refused ")
    assert choice.reason.count("not here") == 2


def test_positions_hidden_from_records_are_noticed() -> None:
    model = gpt2(tied=True)
    choice = choose_engine(model, careless_losses, some_records()[:4], clock=no_time)
    assert choice.engine.name == "vmap"
    assert "refused book-keeping: ConfigError: Embedding" in choice.reason


class Tampered(MicrobatchEngine):
    """Tells norms that are too small, or sums that are wrong."""

    name = "tampered"

    def __init__(self, model: nn.Module, norms: float = 1.0, sums: float = 1.0) -> None:
        super().__init__(model, record_losses)
        self.norms, self.sums = norms, sums

    def accumulate(self, records: Tensor, clip_norm: Bound, sums: Sequence[Tensor]) -> Clipped:
        told = super().accumulate(records, clip_norm, sums)
        for total in sums:
            total.mul_(self.sums)
        return Clipped(told.losses, told.tokens, told.norms * self.norms)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [({"norms": 0.99}, "under-estimated"), ({"sums": 1.001}, "wrong by"), ({"x": 1}, "TypeError")],
)
def test_a_wrong_engine_is_refused(wrong: Any, why: str) -> None:
    model = llama(tied=True)
    choice = choose_engine(
        model, record_losses, some_records()[:4], candidates=[lambda: Tampered(model, **wrong)]
    )
    assert choice.engine.name == "microbatch"
    assert why in choice.reason


def test_an_unnoticed_parameter_is_noticed() -> None:
    """A layer's weight used behind its back never reaches its hooks."""

    class Sneaky(Fragile):
        def forward(self, input_ids: Tensor, position_ids: Tensor) -> Any:
            out: Any = self.inner(input_ids=input_ids, position_ids=position_ids)
            head: Any = self.inner.lm_head
            out.logits = out.logits + 3.0 * head.weight.sum(1)
            return out

    model = Sneaky().eval()
    choice = choose_engine(model, record_losses, some_records()[:4], clock=no_time)
    assert choice.engine.name == "vmap"
    assert "refused book-keeping" in choice.reason


def test_models_that_couple_records_are_refused() -> None:
    class Normed(Fragile):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(LENGTH)

    class Experts(Fragile):
        expert_capacity = 4

    class Averaging(Fragile):
        def forward(self, input_ids: Tensor, position_ids: Tensor) -> Any:
            out: Any = self.inner(input_ids=input_ids, position_ids=position_ids)
            out.logits = out.logits + out.logits.mean(0)
            return out

    for made, what in ((Normed, "statistics"), (Experts, "capacity"), (Averaging, "influence")):
        with pytest.raises(ConfigError, match=what):
            choose_engine(made(), record_losses, some_records()[:4])


def test_the_models_mode_is_kept_and_no_hook_stays() -> None:
    model = llama(tied=False).train()
    choose_engine(model, record_losses, some_records()[:4])
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())
    for parameter in model.parameters():
        parameter.requires_grad = False
    with pytest.raises(ConfigError, match="no parameter"):
        choose_engine(model, record_losses, some_records()[:4])


def test_the_sample_holds_a_padded_record() -> None:
    records = torch.arange(300 * LENGTH).view(300, LENGTH) % 7
    records[77, 3:] = FILL
    assert records[77].tolist() in sample_of(records).tolist()
    assert sample_of(records[:1]).shape == (2, LENGTH)
