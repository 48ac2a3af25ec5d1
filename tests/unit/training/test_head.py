"""The loss with the output layer in pieces, against the model's own logits as a whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from tests.unit.privacy.models import LENGTH, VOCABULARY, adapted, gpt2, llama, some_records
from xpeer.manifest.model import LoraTrain
from xpeer.privacy import blocks, engine_check
from xpeer.privacy.blocks import Blocked, BlockedCall
from xpeer.privacy.clipping import (
    BookKeepingEngine,
    Bound,
    Clipped,
    FunctionalEngine,
    MicrobatchEngine,
    trainable,
)
from xpeer.privacy.engines import Choice, choose_engine
from xpeer.privacy.layers import Call, watch_of
from xpeer.privacy.steps import FULL, Precision, Switchable
from xpeer.training import head
from xpeer.training.held import hold
from xpeer.training.losses import (
    choose_losses,
    evaluate,
    kept_logits,
    record_losses,
    transformers_model,
)
from xpeer.training.quantised import QuantisedLinear, quantise


def family(name: str, **more: Any) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "max_position_embeddings": LENGTH, "use_cache": False, "pad_token_id": None,
        "bos_token_id": 8, "eos_token_id": 9,
    }  # fmt: skip
    config = AutoConfig.for_model(name, **(fields | more))
    model: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


class Kept:
    """A library whose codes are the matrix's own bytes."""

    def quantise(self, weight: Tensor, kind: str, block: int) -> tuple[Tensor, Tensor]:
        return weight.contiguous().view(torch.uint8).flatten(), torch.ones(1)

    def values(self, layer: QuantisedLinear, dtype: torch.dtype) -> Tensor:
        return layer.codes.view(torch.bfloat16).view(layer.shape).to(dtype)


def with_head(model: nn.Module, train: LoraTrain = "both") -> nn.Module:
    """With adapters of some layers, and of the output layer."""
    return adapted(model, train, ["q_proj", "lm_head"])


HALF = Precision("bfloat16", partial(torch.autocast, "cpu", torch.bfloat16))
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: llama(tied=False),
    "llama-tied": lambda: llama(tied=True),
    "llama-lora": lambda: adapted(llama(tied=False)),
    "llama-tied-lora": lambda: adapted(llama(tied=True)),
    "gpt2-tied": lambda: gpt2(tied=True),
    "llama-held-lora": lambda: adapted(hold(llama(tied=False), torch.bfloat16)),
    "llama-tied-held-lora": lambda: adapted(hold(llama(tied=True), torch.bfloat16)),
    "gemma2-tied-held-lora": lambda: adapted(
        hold(family("gemma2", final_logit_softcapping=3.0), torch.bfloat16)
    ),
    "phi-held-lora": lambda: adapted(
        hold(family("phi", num_key_value_heads=2, tie_word_embeddings=False), torch.bfloat16)
    ),
    "llama-nf4-lora": lambda: adapted(
        quantise(hold(llama(tied=False), torch.bfloat16), "nf4", 64, Kept())
    ),
    "qwen3": lambda: family("qwen3", tie_word_embeddings=False),
    "gemma2-tied": lambda: family("gemma2", final_logit_softcapping=3.0, sliding_window=8),
    "gemma2-tied-lora": lambda: adapted(family("gemma2", final_logit_softcapping=3.0)),
    "cohere-lora": lambda: adapted(family("cohere", logit_scale=0.3)),
    "granite": lambda: family("granite", logits_scaling=4.0, tie_word_embeddings=False),
    "phi": lambda: family("phi", num_key_value_heads=2, tie_word_embeddings=False),
    "llama-head": lambda: with_head(llama(tied=False)),
    "llama-tied-head": lambda: with_head(llama(tied=True)),
    "llama-head-b": lambda: with_head(llama(tied=False), train="B"),
    "llama-head-alone": lambda: adapted(llama(tied=False), targets=["lm_head"]),
    "gemma2-tied-held-head": lambda: with_head(
        hold(family("gemma2", final_logit_softcapping=3.0), torch.bfloat16)
    ),
    "granite-head": lambda: with_head(
        family("granite", logits_scaling=4.0, tie_word_embeddings=False)
    ),
    "phi-held-head": lambda: with_head(
        hold(family("phi", num_key_value_heads=2, tie_word_embeddings=False), torch.bfloat16)
    ),
}


@pytest.fixture(autouse=True)
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens at a time, of up to 7 records: 11 tokens are not divisible by that."""
    monkeypatch.setattr(head, "_CPU_LOGITS", 2 * 7 * VOCABULARY)
    monkeypatch.setattr(head, "_CPU_LOGITS_FROZEN", 2 * 7 * VOCABULARY)


def close(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    size = max(float(x.abs().max()) for x in theirs)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * size)


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_all_logits(name: str) -> None:
    model = MODELS[name]()
    records = some_records()
    records[3, 2:5] = -2 - records[3, 2:5]  # read only
    in_pieces, note = choose_losses(model)
    assert note == ""
    weights = torch.linspace(0.2, 1.0, len(records))  # as the engines weigh records
    found = []
    for losses in (record_losses, in_pieces):
        nats, counted = losses(model, records)
        assert counted.tolist() == [11, 6, 11, 8, 1, 11, 11]
        found.append([nats.detach(), *torch.autograd.grad(nats @ weights, trainable(model))])
    close(found[1], found[0])
    assert evaluate(model, records, losses_of_records=in_pieces) == pytest.approx(
        evaluate(model, records), rel=1e-6
    )


@pytest.mark.parametrize("ratio", [0, 20])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gemma2-tied", "gemma2-tied-lora"])
def test_every_engine_clips_it_exactly(
    name: str, ratio: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xpeer.privacy.record_gradients._WRITTEN_RATIO", ratio)
    model, records = MODELS[name](), some_records()
    in_pieces, _ = choose_losses(model)
    wanted = [torch.zeros_like(p) for p in trainable(model)]
    told = MicrobatchEngine(model, record_losses).accumulate(records, 0.5, wanted)
    for engine in (BookKeepingEngine, FunctionalEngine, MicrobatchEngine):
        sums = [torch.zeros_like(p) for p in trainable(model)]
        got = engine(model, in_pieces).accumulate(records, 0.5, sums)
        torch.testing.assert_close(got.norms, told.norms, rtol=1e-5, atol=0)
        close(sums, wanted)


ADAPTED = tuple(name for name in MODELS if "head" in name)
WATCHED = ("llama", "llama-tied", "gpt2-tied", "gemma2-tied", "granite", "phi", *ADAPTED)


@pytest.fixture
def in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tokens of the vocabulary at a time: 11 are not divisible by that."""
    monkeypatch.setattr(blocks, "_CPU_KEPT", 0)
    monkeypatch.setattr(blocks, "_CPU_BLOCK", 3 * 7 * 16)


def parts_of(name: str, bounds: Bound, precision: Precision) -> tuple[Clipped, list[Tensor]]:
    model, records = MODELS[name](), some_records()
    records[3, 2:5] = -2 - records[3, 2:5]  # read only
    losses = Switchable(choose_losses(model)[0])
    losses.precision = precision
    sums = [torch.zeros_like(p) for p in trainable(model)]
    return BookKeepingEngine(model, losses).accumulate(records, bounds, sums), sums


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("name", WATCHED)
def test_in_blocks_of_the_vocabulary_each_record_is_clipped_exactly(name: str) -> None:
    """Tied or not, capped, scaled, with a bias: as autograd has it, record by record."""
    model, records = MODELS[name](), some_records()
    records[3, 2:5] = -2 - records[3, 2:5]
    wanted = [torch.zeros_like(p) for p in trainable(model)]
    told = MicrobatchEngine(model, record_losses).accumulate(records, 0.5, wanted)
    got, sums = parts_of(name, 0.5, FULL)
    torch.testing.assert_close(got.losses, told.losses.float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.norms, told.norms, rtol=1e-5, atol=0)
    close(sums, wanted)


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("low", [FULL, HALF], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", WATCHED)
def test_in_blocks_no_record_adds_more_than_the_norm(name: str, low: Precision) -> None:
    for i in range(7):
        bounds = torch.full((7,), 1e-9, dtype=torch.float64)
        bounds[i] = 0.01
        _, sums = parts_of(name, bounds, low)
        norm = float(torch.cat([total.flatten() for total in sums]).double().norm())
        assert norm == pytest.approx(0.01, rel=1e-4)
        assert norm <= 0.01 * (1 + 1e-6)


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("low", [FULL, HALF], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", WATCHED)
def test_the_self_test_passes_blocks_that_are_right(name: str, low: Precision) -> None:
    model = MODELS[name]()
    choice = chosen(model, low)
    assert choice.engine.name == "book-keeping"
    assert "refused book-keeping" not in choice.reason
    engine: Any = choice.engine
    engine.watch = noted = Noted()
    engine.accumulate(some_records(), 1.0, [torch.zeros_like(p) for p in trainable(model)])
    heads = [call for call in noted.calls if isinstance(call, BlockedCall)]
    output = cast(Any, model).get_output_embeddings()
    watched = output.lora_B["default"] if name in ADAPTED else output
    assert [call.module for call in heads] == [watched]


class Noted:
    """All calls of layers that an engine notes."""

    def __init__(self) -> None:
        self.calls: list[Call | BlockedCall] = []

    def take(self, call: Call | BlockedCall, _batch: int) -> None:
        self.calls.append(call)

    def end(self) -> None:
        pass


def chosen(model: nn.Module, precision: Precision) -> Choice:
    losses = Switchable(choose_losses(model)[0])
    return choose_engine(model, losses, some_records()[:4], clock=lambda: 0.0, precision=precision)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("low", [FULL, HALF], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("fault", ["norms", "sums", "slopes"])
def test_the_self_test_refuses_blocks_that_are_not(
    fault: str, low: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms too small, sums too large by 1%; gradients of logits that forget what is right.

    Its passes are so small that they would keep these gradients: training's may not.
    """
    if fault == "norms":
        whole = Blocked.block
        monkeypatch.setattr(Blocked, "block", lambda *args: 0.99 * whole(*args))
    elif fault == "sums":
        add = Blocked.add_weighted
        monkeypatch.setattr(Blocked, "add_weighted", lambda s, f, out: add(s, 1.01 * f, out))
    else:
        monkeypatch.setattr(head, "_rows", lambda h, x, t, n, g, *span: torch.zeros(1))
    choice = chosen(MODELS["llama"](), low)
    assert choice.engine.name != "book-keeping"
    assert "refused book-keeping" in choice.reason


@pytest.mark.usefixtures("in_blocks")
def test_blocks_of_a_head_that_alone_is_trained() -> None:
    """Then no gradient flows into the model, and yet the call has to come."""
    model: Any = MODELS["llama"]()
    model.model.requires_grad_(False)
    records, (weight,) = some_records(), trainable(model)
    norms = []
    for losses in (record_losses, choose_losses(model)[0]):
        sums = [torch.zeros_like(weight)]
        norms.append(BookKeepingEngine(model, losses).accumulate(records, 0.5, sums).norms)
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-5, atol=0)


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("name", ["llama", *ADAPTED])
def test_gradients_of_all_logits_are_never_there(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A private pass never applies the layer to all tokens and all of the vocabulary."""
    sizes, real = [], nn.functional.linear

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = real(x, weight, bias)
        if len(weight) not in {2, 8, 16, 24}:  # of the layers and of their adapters
            sizes.append(out.numel())
        return out

    model: Any = MODELS[name]()
    records, (losses, _) = some_records(), choose_losses(model)
    monkeypatch.setattr(nn.functional, "linear", watched)
    sums = [torch.zeros_like(p) for p in trainable(model)]
    engine = BookKeepingEngine(model, losses, micro_batch=7)
    engine.watch = noted = Noted()
    engine.accumulate(records, 0.5, sums)
    widths = [call.grad.shape[-1] for call in noted.calls if isinstance(call, Call)]
    assert VOCABULARY not in widths, "no layer's factors are kept that are as wide as the logits"
    assert max(sizes) <= 3 * 7 * 16 < 7 * 11 * VOCABULARY
    assert watch_of(model.get_output_embeddings()) is None, "nobody watches afterwards"


@pytest.mark.usefixtures("in_blocks")
def test_a_record_that_is_not_finite_is_left_out_in_blocks_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = MODELS["llama"]()
    records = some_records()
    records[2] = 5
    records[[0, 1, 3, 4, 5, 6]] = records[[0, 1, 3, 4, 5, 6]].where(
        records[[0, 1, 3, 4, 5, 6]] != 5, 6
    )
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = float("inf")
    sums = [torch.zeros_like(p) for p in trainable(model)]
    got = BookKeepingEngine(model, choose_losses(model)[0]).accumulate(records, 0.5, sums)
    assert torch.isfinite(got.norms).tolist() == [i != 2 for i in range(7)]
    assert all(bool(torch.isfinite(total).all()) for total in sums)


@pytest.mark.parametrize("name", ["llama", "llama-lora"])
def test_logits_of_all_tokens_are_never_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = MODELS[name](), []
    real = nn.functional.linear

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if len(weight) == VOCABULARY:
            seen.append(x.shape[:2])
        return real(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", watched)
    losses, _ = choose_losses(model)
    seen.clear()
    losses(model, some_records())[0].sum().backward()
    assert set(seen) == {(7, 2), (7, 1)}
    again = 2 if name == "llama" else 1  # a frozen layer is not even applied twice
    assert len(seen) == 6 * again


def test_in_half_precision_it_is_as_near_as_all_logits() -> None:
    model = MODELS["gemma2-tied-lora"]()
    in_pieces, _ = choose_losses(model)
    found = []
    for losses, low in ((record_losses, False), (record_losses, True), (in_pieces, True)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            nats, _ = losses(model, some_records())
        gradients = torch.autograd.grad(nats.sum(), trainable(model))
        found.append(torch.cat([g.flatten() for g in gradients]))
    exact, whole, pieces = found
    assert float((pieces - exact).norm()) < 1.5 * float((whole - exact).norm())


@pytest.mark.parametrize("name", [name for name in MODELS if name.endswith("-lora")])
def test_an_output_layer_beside_adapters_is_frozen_in_whatever_type_it_is_held(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, made = MODELS[name](), list[int]()
    assert kept_logits(model) == "", "the gradients of its logits are not kept"
    found = head.find(transformers_model(model))
    assert found is not None
    assert found.frozen
    real: Any = head._FrozenHead.apply

    def noted(*given: Any) -> Any:
        made.append(1)
        return real(*given)

    monkeypatch.setattr(head._FrozenHead, "apply", noted)
    choose_losses(model)[0](model, some_records())[0].sum().backward()
    assert made == [1]


def test_a_family_that_does_more_is_noticed() -> None:
    """After its output layer, or before it."""
    for before, after in ((1.0, 1.01), (1.01, 1.0)):
        model: Any = llama(tied=False)
        model.__class__ = odd(type(model), before, after)
        losses, note = choose_losses(model)
        assert losses is record_losses
        assert "output layer of llama is not known" in note
        assert "training.micro_batch" in note


def odd(kind: Any, before: float, after: float) -> Any:
    def forward(self: Any, input_ids: Tensor, **more: Any) -> Any:
        out = self.model(input_ids=input_ids, **more)
        out.logits = self.lm_head(out[0] * before) * after
        return out

    return type("Odd", (kind,), {"forward": forward})


def test_a_gpu_has_larger_pieces() -> None:
    """On a device that is no processor; this one has shapes alone."""
    layer = nn.Linear(8, 150_000, bias=False, device="meta")
    output = head.Head(nn.Identity(), layer)
    sizes = []

    def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
        sizes.append(logits.numel())
        return torch.empty(len(targets), device="meta")

    hidden = torch.empty(4, 2048, 8, device="meta")
    targets = torch.empty(4, 2048, dtype=torch.int64, device="meta")
    with torch.no_grad():
        head.losses_of_tokens(output, hidden, targets, cross_entropy)
    assert len(sizes) > 1
    assert (1 << 26) < max(sizes) <= 1 << 27


def test_an_output_layer_that_is_not_understood_keeps_all_logits_and_it_is_said() -> None:
    for name in ("llama", "llama-tied", "llama-lora", *ADAPTED):
        assert kept_logits(MODELS[name]()) == ""
    model: Any = MODELS["llama-head"]()
    model.get_output_embeddings().lora_dropout["default"] = nn.Dropout(0.1)
    assert "gradients of all its logits" in kept_logits(model)


@pytest.mark.parametrize(("most", "times"), [(4, 1), (10**6, 2)])
def test_blocks_are_tested_if_training_may_need_them(
    most: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tests = MODELS["llama"](), list[bool]()
    real = engine_check._problem

    def counted(*arguments: Any, **more: Any) -> str:
        tests.append(True)
        return real(*arguments, **more)

    monkeypatch.setattr(engine_check, "_problem", counted)
    losses = Switchable(choose_losses(model)[0])
    candidates = [lambda: BookKeepingEngine(model, losses)]
    choose_engine(model, losses, some_records()[:4], candidates=candidates, most_records=most)
    assert len(tests) == times
