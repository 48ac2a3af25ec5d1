"""Layers that keep their inputs alone, and are computed again in the backward pass.

A layer keeps a dozen tensors of a record for its backward pass. Computed again, it keeps one, and a
step takes a third longer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from xpeer.errors import ConfigError


class Recomputing:
    """The layers of a model that can be computed again.

    Args:
        model: holds a transformers model.

    Attributes:
        on: True iff they are. It never becomes False again.
    """

    def __init__(self, model: nn.Module) -> None:
        self.on = False
        self._layers = layers_of(model)

    def switch_on(self) -> str:
        """Have them computed again from now on; returns words for it, "" = nothing changed."""
        if self.on or not self._layers:
            return ""
        for layer in self._layers:
            layer.forward = Again(layer.forward)
        self.on = True
        return f"{len(self._layers)} layers computed again in the backward pass"

    def require(self) -> str:
        """Switch it on.

        Raises:
            ConfigError: no layer of this family can be computed again.
        """
        if not self._layers:
            raise ConfigError(
                "training.checkpoint_activations = on: this model has no layer that can be so",
                "set it to off, and training.micro_batch to less",
            )
        return self.switch_on()


def layers_of(model: nn.Module) -> list[Any]:
    """The layers that transformers marks as fit to be computed again, each as one."""
    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]


@dataclass
class Again:
    """A layer's forward pass that is computed again in the backward pass."""

    forward: Callable[..., Any]
    """It may be replaced, by what computes the same."""

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        """Compute."""
        tensors = (x for x in (*inputs, *keywords.values()) if isinstance(x, torch.Tensor))
        first = next(tensors, None)
        # torch.func can't compute anything again
        if not torch.is_grad_enabled() or (first is not None and transformed(first)):
            return self.forward(*inputs, **keywords)
        return checkpoint(self.forward, *inputs, use_reentrant=False, **keywords)


def transformed(tensor: torch.Tensor) -> bool:
    """Whether torch.func computes with this tensor."""
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(tensor))
