from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from xpeer.errors import LocalError
from xpeer.privacy.clipping import trainable
from xpeer.privacy.opacus_engine import OpacusEngine

VOCAB, TOKENS, FILL = 40, 12, -1
CLIP = 0.1


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def llama(tied: bool) -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=VOCAB, tie_word_embeddings=tied, **sizes, **heads)
    model: nn.Module = LlamaForCausalLM(config).train()
    return model


def gpt2() -> nn.Module:
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=TOKENS, n_embd=16, n_layer=2, n_head=2, **quiet
    )
    model: nn.Module = GPT2LMHeadModel(config).train()
    return model


def only_some_trained() -> nn.Module:
    model = llama(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "q_proj" in name or "lm_head" in name
    return model


MODELS = {
    "tied llama": lambda: llama(True),
    "untied llama": lambda: llama(False),
    "gpt2": gpt2,
    "partly frozen": only_some_trained,
}


def losses_of(model: nn.Module, ids: Tensor, *, expand: bool = True) -> tuple[Tensor, Tensor]:
    extra = {}
    if isinstance(model, GPT2LMHeadModel):
        positions = torch.arange(ids.shape[1])
        extra["position_ids"] = positions.expand_as(ids) if expand else positions[None]
    logits = model(input_ids=ids.clamp(min=0), use_cache=False, **extra).logits[:, :-1]
    targets = ids[:, 1:]
    counted = targets != FILL
    each = functional.cross_entropy(logits.transpose(1, 2), targets.clamp(min=0), reduction="none")
    return (each * counted).sum(1), counted.sum(1)


def some_records(count: int = 5) -> Tensor:
    records = torch.randint(0, VOCAB, (count, TOKENS))
    records[1, 5:] = FILL
    return records


def one_by_one(model: nn.Module, records: Tensor) -> tuple[list[Tensor], Tensor]:
    parameters = trainable(model)
    sums = [torch.zeros_like(p) for p in parameters]
    norms = []
    for record in records.split(1):
        losses, tokens = losses_of(model, record)
        grads = torch.autograd.grad((losses / tokens).sum(), parameters)
        norms.append(torch.cat([g.flatten() for g in grads]).norm())
        for total, grad in zip(sums, grads, strict=True):
            total.add_(grad * (CLIP / norms[-1]).clamp(max=1.0))
    return sums, torch.stack(norms)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("micro_batch", [0, 2])
def test_sums_and_norms_are_those_of_autograd(kind: str, micro_batch: int) -> None:
    model, records = MODELS[kind](), some_records()
    expected, norms = one_by_one(model, records)
    sums = [torch.zeros_like(p) for p in trainable(model)]
    engine = OpacusEngine(model, losses_of, micro_batch=micro_batch)
    told = engine.accumulate(records, CLIP, sums)
    torch.testing.assert_close(told.norms.float(), norms, rtol=1e-5, atol=0)
    assert bool((norms > CLIP).any()), "nothing was clipped"
    for total, right in zip(sums, expected, strict=True):
        torch.testing.assert_close(total, right, rtol=1e-4, atol=1e-6)
    assert told.tokens.tolist() == [TOKENS - 1, 4] + [TOKENS - 1] * 3
    torch.testing.assert_close(told.losses, losses_of(model, records)[0].detach())


def test_it_adds_to_what_is_there_and_leaves_no_trace_on_the_model() -> None:
    model, records = llama(True), some_records()
    before = [torch.randn_like(p) for p in trainable(model)]
    for parameter, grad in zip(trainable(model), before, strict=True):
        parameter.grad = grad
    kept = [grad.clone() for grad in before]
    names = {name for m in model.modules() for name in vars(m)}
    sums = [torch.ones_like(p) for p in trainable(model)]
    OpacusEngine(model, losses_of).accumulate(records, CLIP, sums)
    expected, _ = one_by_one(model, records)
    for total, right in zip(sums, expected, strict=True):
        torch.testing.assert_close(total, right + 1, rtol=1e-5, atol=1e-5)
    for parameter, grad, copy in zip(trainable(model), before, kept, strict=True):
        assert parameter.grad is grad
        assert torch.equal(grad, copy)
        assert not hasattr(parameter, "grad_sample")
    assert {name for m in model.modules() for name in vars(m)} == names
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def test_an_empty_batch_adds_nothing() -> None:
    model = llama(True)
    sums = [torch.zeros_like(p) for p in trainable(model)]
    told = OpacusEngine(model, losses_of).accumulate(some_records()[:0], CLIP, sums)
    assert len(told.norms) == len(told.tokens) == len(told.losses) == 0
    assert all(bool((total == 0).all()) for total in sums)


def test_a_record_that_is_not_finite_counts_as_zero() -> None:
    model, records = llama(False), some_records()
    records[records == 7] = 8
    records[2, 3] = 7
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[7, 0] = torch.inf
    sums = [torch.zeros_like(p) for p in trainable(model)]
    told = OpacusEngine(model, losses_of).accumulate(records, CLIP, sums)
    assert torch.isfinite(told.norms).tolist() == [True, True, False, True, True]
    expected, _ = one_by_one(model, records[[0, 1, 3, 4]])
    for total, right in zip(sums, expected, strict=True):
        torch.testing.assert_close(total, right, rtol=1e-4, atol=1e-6)


def test_a_model_in_evaluation_mode_is_left_in_it() -> None:
    """By themselves, opacus' hooks would say nothing there, and every gradient would be missing."""
    model, records = llama(True).eval(), some_records()
    expected, _ = one_by_one(model, records)
    sums = [torch.zeros_like(p) for p in trainable(model)]
    OpacusEngine(model, losses_of).accumulate(records, CLIP, sums)
    for total, right in zip(sums, expected, strict=True):
        torch.testing.assert_close(total, right, rtol=1e-4, atol=1e-6)
    assert not any(m.training for m in model.modules())


def test_a_layer_without_records_is_refused_and_the_model_stays_clean() -> None:
    """GPT-2 that embeds the positions once for the whole batch."""
    model = gpt2()

    def shared(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
        return losses_of(model, ids, expand=False)

    sums = [torch.zeros_like(p) for p in trainable(model)]
    with pytest.raises((LocalError, RuntimeError)):
        OpacusEngine(model, shared).accumulate(some_records(), CLIP, sums)
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())


def test_memory_bounds_the_micro_batch() -> None:
    model, sizes = llama(True), []

    def watched(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
        sizes.append(len(ids))
        return losses_of(model, ids)

    record_bytes = 4 * sum(p.numel() for p in trainable(model))
    sums = [torch.zeros_like(p) for p in trainable(model)]
    for memory_bytes, expected in ((3 * record_bytes + 1, [3, 2]), (1, [1] * 5), (1 << 30, [5])):
        sizes.clear()
        engine = OpacusEngine(model, watched, memory_bytes=memory_bytes)
        engine.accumulate(some_records(5), CLIP, sums)
        assert sizes == expected
