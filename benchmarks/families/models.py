"""Tiny models of each family, as their makers publish them: random weights and a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY: Final = 300
POSITIONS: Final = 128
_IDS: Final = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_LLAMA: Final = {
    **_IDS, "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS, "attention_dropout": 0.1,
}  # fmt: skip
_GPT2: Final = {
    **_IDS, "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4,
    "n_positions": POSITIONS,
}  # fmt: skip
_GEMMA: Final = {**_LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 32}
_OPT: Final = {
    **_IDS, "vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": POSITIONS, "word_embed_proj_dim": 32,
}  # fmt: skip
_SMALL: Final = {
    **_IDS, "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4,
}  # fmt: skip
_EXPERTS: Final = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}


def _scaled(**rope: Any) -> dict[str, Any]:
    return {**_LLAMA, "rope_scaling": rope}


FAMILIES: Final[dict[str, dict[str, Any]]] = {
    "llama": {"model_type": "llama", **_LLAMA},
    "llama, rope llama3": {"model_type": "llama", **_scaled(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=64)},
    "llama, rope linear": {"model_type": "llama", **_scaled(rope_type="linear", factor=2.0)},
    "llama, rope dynamic": {"model_type": "llama", **_scaled(rope_type="dynamic", factor=2.0)},
    "llama, rope yarn": {"model_type": "llama", **_scaled(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=32)},
    "qwen2": {"model_type": "qwen2", **_LLAMA},
    "qwen3": {"model_type": "qwen3", **_LLAMA, "head_dim": 8},
    "gemma": {"model_type": "gemma", **_LLAMA, "head_dim": 8},
    "gemma2": {"model_type": "gemma2", **_GEMMA},
    "gemma3, text": {"model_type": "gemma3_text", **_GEMMA},
    "mistral": {"model_type": "mistral", **_LLAMA, "sliding_window": 32},
    "phi": {"model_type": "phi", **_LLAMA, "partial_rotary_factor": 0.5},
    "phi3": {"model_type": "phi3", **_LLAMA},
    "gpt2": {"model_type": "gpt2", **_GPT2},
    "gpt2, untied": {"model_type": "gpt2", **_GPT2, "tie_word_embeddings": False},
    "gpt_neox": {"model_type": "gpt_neox", **_LLAMA},
    "opt": {"model_type": "opt", **_OPT},
    "olmo2": {"model_type": "olmo2", **_LLAMA},
    "mixtral": {"model_type": "mixtral", **_LLAMA, "num_local_experts": 4},
    "qwen2_moe": {"model_type": "qwen2_moe", **_LLAMA, **_EXPERTS, "num_experts": 4,
                  "shared_expert_intermediate_size": 24},
    "falcon": {"model_type": "falcon", **_SMALL},
    "bloom": {"model_type": "bloom", **_IDS, "vocab_size": VOCABULARY, "hidden_size": 32,
              "n_layer": 2, "n_head": 4},
    "gptj": {"model_type": "gptj", **_GPT2, "rotary_dim": 4},
}  # fmt: skip
"""config.json by the family's name; width 32, two layers."""


def save(folder: Path, family: str, **more: Any) -> Path:
    """`save_pretrained` of a random model of this family, and of a tokenizer beside it."""
    config = {**FAMILIES[family], **more}
    kind = config.pop("model_type")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **config), dtype=torch.float32
        )
        model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer() -> Any:
    """Byte-level BPE without merges."""
    symbols = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    symbols += [f"<extra{n}>" for n in range(VOCABULARY - len(symbols))]
    fast = Tokenizer(models.BPE({symbol: n for n, symbol in enumerate(symbols)}, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    names = dict(zip(("bos_token", "eos_token", "pad_token"), symbols, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=fast, **names)
