"""Compiles the layers of a model, where torch can, and leaves them as they are elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from xpeer.training.recompute import Again, layers_of

NOT_WITH_PRIVACY = "training.compile = on: not with privacy, whose engines look into the layers"


def compile_layers(model: nn.Module, try_out: Callable[[], object]) -> tuple[str, bool]:
    """Compile each layer by itself.

    Layers alike share what is compiled, so it takes no longer for many of them. A layer that is
    computed again in the backward pass computes what is compiled twice.

    Args:
        model: holds a transformers model.
        try_out: a forward and a backward pass. If it fails, nothing is compiled. It may switch on
            that layers are computed again, which stays.

    Returns:
        What came of it, for the operator, and whether layers are compiled.
    """
    layers = layers_of(model)
    originals = [_place_of(layer).forward for layer in layers]
    for layer, original in zip(layers, originals, strict=True):
        _place_of(layer).forward = torch.compile(original)
    try:
        try_out()
    except Exception as e:  # noqa: BLE001 - a compiler can fail in any way
        for layer, original in zip(layers, originals, strict=True):
            _place_of(layer).forward = original
        torch._dynamo.reset()
        return f"layers are not compiled, and steps are slower: {type(e).__name__}", False
    # what has to be compiled later, for another length, runs uncompiled if that fails
    torch._dynamo.config.suppress_errors = True
    return f"{len(layers)} layers compiled", True


def _place_of(layer: Any) -> Any:
    """What holds the layer's own forward pass."""
    return layer.forward if isinstance(layer.forward, Again) else layer
