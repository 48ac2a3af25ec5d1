"""Which layers get adapters: finds them by names and patterns, and names them briefly."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import torch

from xpeer.errors import ConfigError

ALL: Final = "all-linear"
"""peft's word for all linear layers but the output."""
_NAME: Final = re.compile(r"[\w.]+")


def find(model: torch.nn.Module, given: Sequence[str]) -> list[str]:
    r"""Find the layers that a founder means.

    Args:
        model: of transformers.
        given: names of layers or their last parts (`q_proj`, `layers.0.mlp.up_proj`), or regular
            expressions for whole names, as peft takes them (`.*layers\.[0-3]\..*_proj`). Empty or
            `all-linear` = all linear layers but the output.

    Returns:
        For `model.lora.targets`: ends of the names of these layers and of no others.

    Raises:
        ConfigError: a name or a pattern is of no linear layer; names those that there are.
    """
    linear = names_of(model)
    if list(given) in ([], [ALL]):
        return [] if len(linear) == len(_all(model)) else _of_text(model, linear)
    found: set[str] = set()
    for each in given:
        chosen = [name for name in linear if _means(each, name)]
        if not chosen:
            raise _unknown(each, linear)
        found.update(chosen)
    return shortest([name for name in linear if name in found], _all(model))


def names_of(model: torch.nn.Module) -> list[str]:
    """Names of all layers that an adapter can be added to, the output included.

    Of a model of several parts (text and images), those of the language model: text reaches no
    other.
    """
    inside, output = _language_model(model), _output(model)
    return [n for n in _all(model) if n == output or n.startswith(inside)]


def _all(model: torch.nn.Module) -> list[str]:
    from transformers.pytorch_utils import Conv1D  # noqa: PLC0415 - takes seconds

    kinds = torch.nn.Linear, Conv1D
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def _language_model(model: torch.nn.Module) -> str:
    """Beginning of the names of its parts; empty = the model is nothing else."""
    whole: Any = model
    text = whole.config.get_text_config()
    if text is whole.config:
        return ""
    parts = (
        name
        for name, module in model.named_modules()
        if name and type(getattr(module, "config", None)) is type(text)
    )
    return f"{found}." if (found := next(parts, "")) else ""


def _output(model: torch.nn.Module) -> str:
    whole: Any = model
    output = whole.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is output), "")


def _of_text(model: torch.nn.Module, linear: list[str]) -> list[str]:
    """All of the language model, as peft's word would mean those of the other parts, too."""
    output = _output(model)
    return shortest([name for name in linear if name != output], _all(model))


def shortest(names: Sequence[str], linear: Sequence[str]) -> list[str]:
    """Name layers by the last part, where all layers of that last part are named.

    Args:
        names: to name.
        linear: of the whole model.
    """
    there, here = (Counter(map(_last, each)) for each in (linear, names))
    short = (_last(name) if here[_last(name)] == there[_last(name)] else name for name in names)
    return list(dict.fromkeys(short))


def _means(given: str, name: str) -> bool:
    if _NAME.fullmatch(given):
        return name == given or name.endswith(f".{given}")
    try:
        return re.fullmatch(given, name) is not None
    except re.error as e:
        raise ConfigError(
            f"--lora-target: {given!r} is no name, and no regular expression: {e}",
            "name a layer by the last part of its name, e.g. q_proj",
        ) from e


def _unknown(given: str, linear: Sequence[str]) -> ConfigError:
    counts = Counter(map(_last, linear))
    known = ", ".join(f"{last} ({count})" for last, count in sorted(counts.items()))
    return ConfigError(
        f"model.lora.targets: {given!r} is no linear layer of the model; it has {known}",
        f"name some of these, or whole names such as {linear[0] if linear else 'none'}; without "
        "--lora-target all but the output get an adapter",
    )


def _last(name: str) -> str:
    return name.rpartition(".")[2]
