"""Completes the config.json of an export for engines that read more than transformers 5 writes.

vLLM and llama.cpp's converter read it by the transformers beside them, of version 4 or 5, or as it
stands. Version 4 knows `torch_dtype`, `rope_theta` and `rope_scaling`. Version 5 writes `dtype` and
`rope_parameters` in their place, and version 4 then takes its defaults, without a word: the export
would run, and talk nonsense. So both are written. A key that the source left to a default is
written, too, since defaults change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_READ: Final = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
    *("rms_norm_eps", "layer_norm_eps", "hidden_act", "hidden_activation", "tie_word_embeddings"),
    *("attention_bias", "mlp_bias", "sliding_window", "use_sliding_window", "layer_types"),
    *("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
"""Keys that these engines read, of the families Llama, Qwen, Gemma and the like."""
_TEXT: Final = "text_config"
_FULL, _SLIDING = "full_attention", "sliding_attention"


def completed(config: Mapping[str, Any], made: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Add what is missing; what the source said itself is never changed, but for the type.

    Args:
        config: of the export, so far.
        made: of the model, by transformers, with all defaults.
        dtype: name of the type that the weights are written in.
    """
    out = {key: made[key] for key in _READ if made.get(key) is not None}
    out |= _positions(made.get("rope_parameters"))
    out |= dict(config) | {"dtype": dtype, "torch_dtype": dtype}
    if isinstance(text := made.get(_TEXT), Mapping):  # Gemma 3 with images: a config inside
        out[_TEXT] = completed(config.get(_TEXT) or {}, text, dtype)
    return out


def _positions(rope: Any) -> dict[str, Any]:
    """The rotary embedding's settings under their names in version 4."""
    if not isinstance(rope, Mapping):
        return {}
    out = {}
    if isinstance(local := rope.get(_SLIDING), Mapping):  # Gemma 3: two kinds of layers
        out["rope_local_base_freq"] = local.get("rope_theta")
    if isinstance(rope.get(_FULL), Mapping):
        rope = rope[_FULL]
    out |= {key: rope.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    if rope.get("rope_type", "default") != "default":
        out["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    return {key: value for key, value in out.items() if value is not None}
