"""Checks that the manifest's config rebuilds exactly the model that was loaded.

Transformers is lenient. It leaves out weights that the config has no place for, and it unties tied
weights that differ. The manifest holds only the config, so a restart would build another model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from xpeer.errors import ConfigError
from xpeer.training.flat import all_finite

ALONE: Final = "docs/finetune.md, 'A language model inside of another'"
"""Where it says how to save the language model of a model of several parts."""
_CONSTANTS: Final = re.compile(
    r"(rotary_emb\.inv_freq|\.(attn|attention)\.(masked_)?bias|position_ids)$"
)
"""Tensors that follow from the config; older versions of transformers saved them, too."""
_KEYS: Final = (
    (r"embed_positions|wpe|position_emb", ("max_position_embeddings",)),
    (r"embed|wte|lm_head|output", ("vocab_size", "hidden_size")),
    (r"[kv]_proj", ("num_key_value_heads", "head_dim")),
    (r"[qo]_proj|attn|attention|qkv", ("num_attention_heads", "num_key_value_heads", "head_dim")),
    (r"mlp|fc|gate|up_proj|down_proj|expert", ("intermediate_size", "num_local_experts")),
    (r"", ("hidden_size",)),
)
"""Keys of the config that decide a tensor's shape, by its name."""
_BIASES: Final = (
    ("attn|attention|_proj", ("attention_bias", "qkv_bias", "use_bias", "bias")),
    ("mlp|fc|gate|up_proj|down_proj", ("mlp_bias", "use_bias", "bias")),
)


def require_complete(
    folder: Path, model: torch.nn.Module, raw: Mapping[str, Any], report: Mapping[str, Any]
) -> None:
    """Check that the folder's weights and the model's are the same ones.

    Args:
        folder: where the model was loaded from.
        model: as loaded.
        raw: the folder's config.json.
        report: the loading report of `from_pretrained`.

    Raises:
        ConfigError: they differ; names the key of config.json, both values, and a weight.
    """
    other = {str(name): tuple(sizes) for name, *sizes in report["mismatched_keys"]}
    missing = sorted(set(map(str, report["missing_keys"])) - other.keys())
    extra = sorted(k for k in map(str, report["unexpected_keys"]) if not _CONSTANTS.search(k))
    if other:
        raise _other_shape(folder, model, raw, other)
    if _output_names(model) & set(missing) and len(missing) == 1:
        raise ConfigError(
            f"model {folder}: {_said(raw, model, 'tie_word_embeddings')}, but its weights lack "
            f"{missing[0]}: that is tie_word_embeddings = true",
            "correct config.json, or save the model again with all of its weights",
        )
    if missing or extra:
        raise _other_names(folder, model, raw, missing, extra)
    _require_tying(folder, model, raw)
    _require_finite(folder, model)


def require_same(model: torch.nn.Module, rebuilt: torch.nn.Module) -> None:
    """Compare the parameters' names, shapes and tying, and the buffers' names and shapes.

    Args:
        model: as loaded.
        rebuilt: built from the manifest's config, on any device; its values do not matter.

    Raises:
        ConfigError: they differ; names the first difference and both values.
    """
    for what, ours, theirs in (
        ("parameter", _shapes(model.named_parameters()), _shapes(rebuilt.named_parameters())),
        ("buffer", _shapes(model.named_buffers()), _shapes(rebuilt.named_buffers())),
    ):
        for name in [*ours, *theirs]:
            here, there = ours.get(name, "none"), theirs.get(name, "none")
            if here != there:
                raise ConfigError(
                    f"model.config rebuilds another model: {what} {name} is {here} as loaded, and "
                    f"{there} when it is built from the config",
                    "correct config.json, so that it describes its weights",
                )
    if _ties(model) != _ties(rebuilt):
        first = (_ties(model) ^ _ties(rebuilt)).pop()
        raise ConfigError(
            f"model.config rebuilds another model: {' and '.join(sorted(first))} are "
            f"{'one tensor' if first in _ties(model) else 'two tensors'} as loaded, but not when "
            "it is built from the config",
            "correct tie_word_embeddings in config.json",
        )


def _require_tying(folder: Path, model: torch.nn.Module, raw: Mapping[str, Any]) -> None:
    """Check that input and output embeddings are tied if the config says so."""
    inner: Any = model
    output, embedding = inner.get_output_embeddings(), inner.get_input_embeddings()
    tied = bool(getattr(inner.config, "tie_word_embeddings", False))
    if output is None or embedding is None or not tied or output.weight is embedding.weight:
        return
    name = next(iter(sorted(_output_names(model))), "the output weights")
    raise ConfigError(
        f"model {folder}: {_said(raw, model, 'tie_word_embeddings')}, but its weights hold {name} "
        "with values of its own: that is tie_word_embeddings = false",
        "set tie_word_embeddings to false in config.json; or to keep it, remove that weight",
    )


def _require_finite(folder: Path, model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if not all_finite(parameter):
            bad = int((~torch.isfinite(parameter)).sum())
            raise ConfigError(
                f"model {folder}: {name} holds {bad} values that are not finite (inf or nan)",
                "get an undamaged copy; weights in float16 may have overflown",
            )


def _other_shape(
    folder: Path,
    model: torch.nn.Module,
    raw: Mapping[str, Any],
    other: Mapping[str, tuple[Any, ...]],
) -> ConfigError:
    name, sizes = next(iter(sorted(other.items(), key=lambda item: "embed" not in item[0])))
    loaded, built = (tuple(size) for size in sizes[:2])
    keys = next(keys for pattern, keys in _KEYS if re.search(pattern, name))
    config = _text_config(model)
    differing = [ours for ours, theirs in zip(built, loaded, strict=False) if ours != theirs]
    known = [key for key in keys if getattr(config, key, None) is not None]
    exact = [key for key in known if getattr(config, key) in differing]
    said = " and ".join(_said(raw, model, key) for key in (exact or known)[:2])
    return ConfigError(
        f"model {folder}: {said}, so that {name} would be {_by(built)}, but in its weights it is "
        f"{_by(loaded)}" + (f" ({len(other)} weights are of another shape)" if other else ""),
        "correct config.json, so that it describes its weights",
    )


def _other_names(
    folder: Path, model: torch.nn.Module, raw: Mapping[str, Any], missing: list[str],
    extra: list[str],
) -> ConfigError:  # fmt: skip
    layers = int(getattr(_text_config(model), "num_hidden_layers", 0) or 0)
    numbers = {name: _layer_of(name) for name in (*missing, *extra)}
    held = max((n for name in extra if (n := numbers[name]) is not None), default=-1) + 1
    lacked = min((n for name in missing if (n := numbers[name]) is not None), default=layers)
    in_weights = held if held > layers else lacked
    whole = not (missing and extra) and in_weights > 0 and not _all_biases(numbers)
    if layers and in_weights != layers and whole:
        if all((n := numbers[name]) is not None and n >= min(layers, in_weights)
               for name in numbers):  # fmt: skip
            return ConfigError(
                f"model {folder}: {_said(raw, model, 'num_hidden_layers')}, but its weights are "
                f"of {in_weights} layers (e.g. {(extra or missing)[0]})",
                "correct config.json, so that it describes its weights",
            )
    about = f"{_said(raw, model, key)}, but " if (key := _bias_key(model, numbers)) else ""
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        kind = getattr(_text_config(model), "model_type", "causal")
        lacks = f"; it lacks {missing[0]}" if missing else ""
        parts = isinstance(raw.get("text_config"), Mapping)
        return ConfigError(
            f"model {folder}: {about}its weights hold {extra[0]}{more}, for which a {kind} language"
            f" model of this config has no place{lacks}: they would be left out",
            f"save the language model alone, and give its folder: {ALONE}"
            if parts
            else "correct config.json, or save a causal language model without anything else",
        )
    return ConfigError(
        f"model {folder}: {about}{len(missing)} weights are missing, e.g. {missing[0]}",
        "the weights have to be those of a causal language model with this config",
    )


def _said(raw: Mapping[str, Any], model: torch.nn.Module, key: str) -> str:
    """Say what config.json has for a key, under the name that it has there."""
    config = _text_config(model)
    own = next(
        (mine for name, mine in getattr(config, "attribute_map", {}).items() if name == key), key
    )
    value = str(getattr(config, key, None))
    value = {"True": "true", "False": "false", "None": "null"}.get(value, value)
    nested = raw.get("text_config")
    for prefix, section in (("", raw), ("text_config.", nested)):
        for name in (key, own):
            if isinstance(section, Mapping) and name in section:
                return f"config.json says {prefix}{name} = {value}"
    return f"config.json leaves {own} at {value}"


def _bias_key(model: torch.nn.Module, names: Iterable[str]) -> str:
    """The key that decides about these biases; empty = not all are biases, or there is no key."""
    weights = list(names)
    for pattern, keys in _BIASES:
        if _all_biases(weights) and all(re.search(pattern, name) for name in weights):
            config = _text_config(model)
            return next((key for key in keys if getattr(config, key, None) is not None), "")
    return ""


def _all_biases(names: Iterable[str]) -> bool:
    return all(name.endswith("bias") for name in names)


def _layer_of(name: str) -> int | None:
    match = re.search(r"\.(\d+)\.", f".{name}")
    return int(match[1]) if match else None


def _text_config(model: torch.nn.Module) -> Any:
    inner: Any = model
    return inner.config.get_text_config()


def _output_names(model: torch.nn.Module) -> set[str]:
    inner: Any = model
    output = inner.get_output_embeddings()
    if output is None:
        return set()
    return {n for n, p in model.named_parameters(remove_duplicate=False) if p is output.weight}


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _shapes(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    return {name: _by(tuple(tensor.shape)) or "a number" for name, tensor in tensors}


def _ties(model: torch.nn.Module) -> set[frozenset[str]]:
    """Groups of names that belong to one parameter."""
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in groups.values() if len(group) > 1}
