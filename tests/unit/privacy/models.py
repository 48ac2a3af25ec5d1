"""Tiny models and a loss for the tests of clipping and of the mechanism."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from xpeer.manifest.model import Lora, LoraTrain
from xpeer.training.adapters import adapt

PAD = 10
"""Of the models' configs; an id like any other."""
FILL = -1
VOCABULARY = 11
LENGTH = 12

torch.set_num_threads(1)


def record_losses(model: nn.Module, records: Tensor) -> tuple[Tensor, Tensor]:
    """As training.model has it, without importing training."""
    positions = torch.arange(records.shape[1]).expand(records.shape)
    logits = model(input_ids=records.clamp(min=0), position_ids=positions).logits[:, :-1]
    targets = records[:, 1:]
    kept = targets >= 0
    losses = functional.cross_entropy(
        logits.transpose(1, 2), targets.where(kept, -100), reduction="none", ignore_index=-100
    )
    return losses.sum(1), kept.sum(1)


def careless_losses(model: nn.Module, records: Tensor) -> tuple[Tensor, Tensor]:
    """Without position_ids: GPT-2 then looks up one row of positions for all records."""

    def without(input_ids: Tensor, position_ids: Tensor) -> Any:
        return model(input_ids=input_ids)

    bare: Any = without
    return record_losses(bare, records)


def llama(*, tied: bool, **more: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": LENGTH, "tie_word_embeddings": tied, "use_cache": False,
        "pad_token_id": PAD, "bos_token_id": 8, "eos_token_id": 9,
    }  # fmt: skip
    config = LlamaConfig(**(fields | more))
    config._attn_implementation = "eager"  # as training.model builds them
    return _louder(LlamaForCausalLM(config))


def gpt2(*, tied: bool) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(2)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=LENGTH, use_cache=False,
        tie_word_embeddings=tied, bos_token_id=8, eos_token_id=9,
    )  # fmt: skip
    config._attn_implementation = "eager"
    return _louder(GPT2LMHeadModel(config))


def neox(*, tied: bool) -> nn.Module:
    """Layer norms with biases, queries, keys and values in one matrix, rotation of a part."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(4)
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=LENGTH, use_cache=False,
        tie_word_embeddings=tied, bos_token_id=8, eos_token_id=9,
    )  # fmt: skip
    return _louder(GPTNeoXForCausalLM(config))


def qwen2(*, tied: bool) -> nn.Module:
    """Biases in the attention alone."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(5)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH,
        use_cache=False, tie_word_embeddings=tied, bos_token_id=8, eos_token_id=9,
    )  # fmt: skip
    return _louder(Qwen2ForCausalLM(config))


def mixtral() -> nn.Module:
    """Experts, chosen token by token by a router that returns several things."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(8)
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH,
        num_local_experts=4, use_cache=False, pad_token_id=PAD, bos_token_id=8, eos_token_id=9,
    )  # fmt: skip
    return _louder(MixtralForCausalLM(config))


def opt() -> nn.Module:
    """It draws random numbers in training mode, whether or not anything is dropped."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(9)
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=16, word_embed_proj_dim=16, ffn_dim=24,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=LENGTH, dropout=0.0,
        use_cache=False, pad_token_id=PAD, bos_token_id=8, eos_token_id=9,
    )  # fmt: skip
    return _louder(OPTForCausalLM(config))


def adapted(model: nn.Module, train: LoraTrain = "both", targets: Sequence[str] = ()) -> nn.Module:
    """With adapters of rank 2 next to all its linear layers, or to these; no longer zero."""
    lora = Lora(rank=2, alpha=4.0, seed=6, base_digest="", targets=[*targets], train=train)
    made = adapt(model, lora)
    torch.manual_seed(7)
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return made.eval()


def _louder(model: Any) -> nn.Module:
    """Larger weights, so that records' gradients differ; all ids are trained, as `model` has it."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    silent: nn.Module = model.eval()
    return silent


def some_records(number: int = 7) -> Tensor:
    """(n, LENGTH): random tokens, some filled up, one but for two tokens."""
    generator = torch.Generator().manual_seed(3)
    records = torch.randint(0, VOCABULARY, (number, LENGTH), generator=generator)
    records[1 % number, 7:] = FILL
    records[4 % number, 2:] = FILL
    return records


def by_autograd(model: nn.Module, records: Tensor, clip_norm: float) -> tuple[Tensor, list[Tensor]]:
    """Norms (n,) and the sum of clipped gradients, written as plainly as can be."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    sums = [torch.zeros_like(p) for p in parameters]
    norms = []
    for record in records:
        model.zero_grad(set_to_none=True)
        losses, tokens = record_losses(model, record[None])
        (losses[0] / tokens[0]).backward()
        flat = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        norms.append(flat.norm())
        for total, p in zip(sums, parameters, strict=True):
            if p.grad is not None:
                total.add_(p.grad * min(1.0, clip_norm / float(flat.norm())))
    model.zero_grad(set_to_none=True)
    return torch.stack(norms), sums
