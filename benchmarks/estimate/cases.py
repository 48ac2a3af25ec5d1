"""Models and settings whose memory is measured, from 2 to 360 million parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from xpeer.estimate.step import Step
from xpeer.manifest.model import Lora

ADAPTERS: Final = Lora(16, 32.0, 1, "0" * 64)


def llama(hidden: int, inner: int, layers: int, heads: int, kv: int, ids: int) -> dict[str, Any]:
    """A config of the Llama family."""
    return {
        "model_type": "llama",
        "vocab_size": ids,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    }


_SMALL: Final = llama(192, 512, 4, 6, 6, 320)
_SMOL: Final = llama(576, 1536, 30, 9, 3, 49152)
_LARGE: Final = llama(960, 2560, 32, 15, 5, 49152)
"""SmolLM2's shapes of 135 and 360 M parameters."""
_QWEN: Final = {
    **llama(256, 768, 8, 4, 2, 32000),
    "model_type": "qwen3",
    "head_dim": 64,
}
CASES: Final = {
    "2 M": Step(config=_SMALL, sequence_tokens=256, micro_batch=32, private=False),
    "2 M, private": Step(config=_SMALL, sequence_tokens=256, micro_batch=32, private=True),
    "qwen3 16 M, private": Step(config=_QWEN, sequence_tokens=256, micro_batch=8, private=True),
    "135 M": Step(config=_SMOL, sequence_tokens=512, micro_batch=2, private=False),
    "135 M, private": Step(config=_SMOL, sequence_tokens=512, micro_batch=2, private=True),
    "135 M, private, layers again": Step(
        config=_SMOL, sequence_tokens=512, micro_batch=4, private=True, recompute=True
    ),
    "135 M, LoRA": Step(
        config=_SMOL, lora=ADAPTERS, sequence_tokens=512, micro_batch=2, private=False
    ),
    "135 M, LoRA, private, bfloat16 base": Step(
        config=_SMOL,
        lora=ADAPTERS,
        base_dtype="bfloat16",
        sequence_tokens=512,
        micro_batch=2,
        private=True,
    ),
    "135 M, LoRA, private, all in bfloat16": Step(
        config=_SMOL,
        lora=ADAPTERS,
        base_dtype="bfloat16",
        precision="bfloat16",
        sequence_tokens=256,
        micro_batch=2,
        private=True,
    ),
    "360 M, LoRA, private, bfloat16 base, layers again": Step(
        config=_LARGE,
        lora=ADAPTERS,
        base_dtype="bfloat16",
        sequence_tokens=512,
        micro_batch=2,
        private=True,
        recompute=True,
    ),
    "360 M, private, layers again": Step(
        config=_LARGE, sequence_tokens=256, micro_batch=1, private=True, recompute=True
    ),
}
QUICK: Final = ("2 M", "2 M, private", "qwen3 16 M, private")
SEVEN_BILLION: Final = {
    **llama(4096, 11008, 32, 32, 32, 32000),
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
PLAN: Final = Step(
    config=SEVEN_BILLION,
    lora=ADAPTERS,
    base_dtype="bfloat16",
    precision="bfloat16",
    sequence_tokens=2048,
    micro_batch=1,
    private=True,
    recompute=True,
)
"""Llama 2's shape of 7 B: does LoRA with privacy fit a GPU of 24 GB?"""


@dataclass(frozen=True)
class Node:
    """A node whose trainer is started."""

    config: dict[str, Any]
    lora: bool
    private: bool
    micro_batch: int
    sequence_tokens: int
    again: bool = False
    """Whether activations are computed again."""


TRAINERS: Final = {
    "2 M": Node(_SMALL, lora=False, private=False, micro_batch=16, sequence_tokens=128),
    "2 M, private": Node(_SMALL, lora=False, private=True, micro_batch=16, sequence_tokens=128),
    "2 M, LoRA, private": Node(_SMALL, True, True, micro_batch=16, sequence_tokens=128),
    "135 M": Node(_SMOL, lora=False, private=False, micro_batch=2, sequence_tokens=256),
    "135 M, private": Node(_SMOL, lora=False, private=True, micro_batch=2, sequence_tokens=256),
    "135 M, LoRA": Node(_SMOL, lora=True, private=False, micro_batch=2, sequence_tokens=256),
    "135 M, LoRA, private": Node(_SMOL, True, True, micro_batch=2, sequence_tokens=256),
    "135 M, LoRA, private, layers again": Node(_SMOL, True, True, 2, 256, again=True),
    "360 M, LoRA, private": Node(_LARGE, True, True, micro_batch=2, sequence_tokens=256),
}
QUICK_TRAINERS: Final = ("2 M", "2 M, private")
