"""The loss with the output layer in pieces, against the model's own logits as a whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.privacy.models import LENGTH, VOCABULARY, adapted, gpt2, llama, some_records
from xpeer.privacy.clipping import BookKeepingEngine, FunctionalEngine, MicrobatchEngine, trainable
from xpeer.training import head
from xpeer.training.losses import choose_losses, evaluate, record_losses


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


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: llama(tied=False),
    "llama-tied": lambda: llama(tied=True),
    "llama-lora": lambda: adapted(llama(tied=False)),
    "llama-tied-lora": lambda: adapted(llama(tied=True)),
    "gpt2-tied": lambda: gpt2(tied=True),
    "qwen3": lambda: family("qwen3", tie_word_embeddings=False),
    "gemma2-tied": lambda: family("gemma2", final_logit_softcapping=3.0, sliding_window=8),
    "gemma2-tied-lora": lambda: adapted(family("gemma2", final_logit_softcapping=3.0)),
    "cohere-lora": lambda: adapted(family("cohere", logit_scale=0.3)),
    "granite": lambda: family("granite", logits_scaling=4.0, tie_word_embeddings=False),
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
