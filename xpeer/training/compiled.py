"""Compiles the layers of a model, where torch can, and leaves them as they are elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from xpeer.training.recompute import layers_of

NOT_WITH_PRIVACY = "training.compile = on: not with privacy, whose engines look into the layers"


def compile_layers(model: nn.Module, try_out: Callable[[], object]) -> str:
    """Compile each layer by itself; returns what came of it, for the operator.

    Layers alike share what is compiled, so it takes no longer for many of them.

    Args:
        model: holds a transformers model.
        try_out: a forward and a backward pass. If it fails, nothing is compiled.
    """
    layers = layers_of(model)
    for layer in layers:
        layer.forward = torch.compile(layer.forward)
    try:
        try_out()
    except Exception as e:  # noqa: BLE001 - a compiler can fail in any way
        for layer in layers:
            del layer.forward
        torch._dynamo.reset()
        return f"layers are not compiled, and steps are slower: {type(e).__name__}"
    # what has to be compiled later, for another length, runs uncompiled if that fails
    torch._dynamo.config.suppress_errors = True
    return f"{len(layers)} layers compiled"
