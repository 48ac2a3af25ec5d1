"""config.json of an export, as vLLM and llama.cpp's converter read it.

By their sources of November 2026: llama.cpp `conversion/base.py` (`TextModel.set_gguf_parameters`)
and the classes of the families; vLLM `transformers_utils/config.py` (`patch_rope_parameters`). Both
go through the transformers that is installed beside them: version 4 knows other names than 5.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from xpeer.founding_model import PRESETS
from xpeer.training.export import export_hf
from xpeer.training.kept import Source
from xpeer.training.model import build

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 64, "head_dim": 8,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
PLAIN = {"rope_type": "default", "rope_theta": 1e6}
INTEGERS = [key for key in SIZES if key != "head_dim"]
ALL: dict[str, type] = {
    **dict.fromkeys(INTEGERS, int), "model_type": str, "architectures": list, "dtype": str,
    "torch_dtype": str, "rms_norm_eps": float, "tie_word_embeddings": bool, "rope_theta": float,
}  # fmt: skip
GEMMA: dict[str, type] = {
    "hidden_activation": str, "head_dim": int, "query_pre_attn_scalar": int, "sliding_window": int,
    "layer_types": list,
}  # fmt: skip
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, type]]] = {
    "llama": ({"rope_parameters": {**LLAMA3, "rope_theta": 5e5}},
              {"hidden_act": str, "attention_bias": bool, "mlp_bias": bool, "rope_scaling": dict}),
    "qwen2": ({"rope_parameters": PLAIN}, {"hidden_act": str}),
    "qwen3": ({"rope_parameters": PLAIN}, {"hidden_act": str, "head_dim": int}),
    "gemma2": ({}, {**GEMMA, "attn_logit_softcapping": float, "final_logit_softcapping": float}),
    "gemma3_text": ({"rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }}, {**GEMMA, "rope_local_base_freq": float, "rope_scaling": dict}),
}  # fmt: skip


def exported(family: str, source: Source | None = None) -> tuple[Any, dict[str, Any]]:
    """A config as transformers 5 saves it, and that of its export."""
    config: Any = AutoConfig.for_model(family, **SIZES, **FAMILIES[family][0])
    source = source or Source(config.to_diff_dict() | {"model_type": family, "dtype": "bfloat16"})
    return config, source.config_json(SimpleNamespace(config=config))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_that_others_read_is_there_with_its_type(family: str) -> None:
    _, made = exported(family)
    for key, kind in (ALL | FAMILIES[family][1]).items():
        assert isinstance(made.get(key), int | float if kind is float else kind), key
    assert made["dtype"] == made["torch_dtype"] == "bfloat16"
    json.dumps(made)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_5_reads_the_same_model(family: str) -> None:
    config, made = exported(family)
    rest = {key: value for key, value in made.items() if key != "model_type"}
    again: Any = AutoConfig.for_model(family, **rest)
    for key in (*SIZES, "rope_parameters", "layer_types"):
        assert getattr(again, key, None) == getattr(config, key, None), key


def test_rotary_embeddings_have_their_old_names() -> None:
    _, llama = exported("llama")
    assert (llama["rope_theta"], llama["rope_scaling"]) == (5e5, LLAMA3)
    _, gemma = exported("gemma3_text")
    assert (gemma["rope_theta"], gemma["rope_local_base_freq"]) == (1e6, 1e4)
    assert gemma["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    _, qwen = exported("qwen3")
    assert (qwen["rope_theta"], qwen.get("rope_scaling")) == (1e6, None)


def test_what_the_source_said_stays() -> None:
    said = {"torch_dtype": "float16", "rope_theta": 123.0, "rope_scaling": None, "own": [1]}
    _, made = exported("llama", Source(said))
    assert made.items() >= said.items()
    assert made["dtype"] == "float16"
    _, made = exported("llama", Source(said, dtype="float32"))
    assert made["dtype"] == made["torch_dtype"] == "float32"


def test_an_export_of_a_preset_says_what_it_leaves_to_defaults(tmp_path: Path) -> None:
    export_hf(
        build(PRESETS["tiny"], seed=1), None, tmp_path / "out", source=Source(PRESETS["tiny"])
    )
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "rms_norm_eps" not in PRESETS["tiny"]
    for key, kind in ALL.items():
        assert isinstance(made.get(key), int | float if kind is float else kind), key
    assert torch.float32 == getattr(torch, made["dtype"])
