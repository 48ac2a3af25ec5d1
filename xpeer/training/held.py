"""Frozen weights held in bfloat16, at half the memory, and computed with in the input's precision.

Embeddings and matrices hold bfloat16. Everything small (norms, biases, buffers) stays float32, with
values that bfloat16 can express. A layer converts its matrix when it is used, forward and backward,
and keeps no converted copy. So gradients are those of a float32 model with the same values, and the
private engines see float32. Under autocast the matrix is used as it is.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from xpeer.manifest.model import BaseDtype

DTYPES: Final[dict[BaseDtype, torch.dtype]] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "int8": torch.bfloat16,
    "nf4": torch.bfloat16,
}
"""By `model.base_dtype` of the manifest: of the values that are hashed, and of the matrices that
`quantised` leaves as they are."""


class _Product(torch.autograd.Function):
    """x W^T, (..., n) -> (..., m) of x's type, for the W that a function makes in a type."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, matrix: Callable[[torch.dtype], Tensor]) -> Tensor:
        return x @ matrix(x.dtype).T

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.matrix = inputs[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.matrix(grads[0].dtype), None


def product(x: Tensor, matrix: Callable[[torch.dtype], Tensor], bias: Tensor | None) -> Tensor:
    """Multiply by a matrix that is not trained: x W^T + b, of x's type.

    Args:
        x: (..., n).
        matrix: makes W, (m, n), in a type; called once forward and once backward.
        bias: b, (m,); None = 0.
    """
    run: Any = _Product.apply
    out: Tensor = run(x, matrix)
    return out if bias is None else out + bias.to(out.dtype)


def _with_weight(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type):
        return functional.linear(x, weight, None if bias is None else bias.to(weight.dtype))
    return product(x, weight.to, bias)


class _HeldLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return _with_weight(input, self.weight, self.bias)


def is_product(layer: nn.Module) -> bool:
    """Whether a layer is x W^T + b and nothing else, whatever type W is held in."""
    return type(layer) in (nn.Linear, _HeldLinear)


class _HeldConv1D(Conv1D):  # type: ignore[misc] # transformers' GPT-2: W is (in, out)
    def forward(self, x: Tensor) -> Tensor:
        return _with_weight(x, self.weight.T, self.bias)


class _HeldEmbedding(nn.Embedding):
    """Looks its rows up, and has the model's own code do the rest with these rows as float32."""

    def forward(self, input: Tensor) -> Tensor:
        rows = functional.embedding(input.flatten(), self.weight).float()
        small = copy.copy(self)  # shares all but its parameters
        small._parameters = {"weight": rows}  # type: ignore[dict-item] # looked up like one
        places = torch.arange(len(rows), device=input.device).view_as(input)
        return super(_HeldEmbedding, small).forward(places)


_HELD: Final = (_HeldLinear, _HeldConv1D, _HeldEmbedding)


def _held(module: nn.Module) -> type[nn.Module] | None:
    """The class that a layer becomes; None = it stays as it is."""
    kind: Any = type(module)
    made: type[nn.Module] | None = _held_class(kind)
    return made


@functools.cache
def _held_class(kind: Any) -> Any:
    if kind is nn.Linear:
        return _HeldLinear
    if kind is Conv1D:
        return _HeldConv1D
    scaled = issubclass(kind, nn.Embedding) and kind.__name__.endswith("ScaledWordEmbedding")
    if kind is nn.Embedding or scaled:  # Gemma's; others compute their places from more than ids
        return type(f"Held{kind.__name__}", (_HeldEmbedding, kind), {})
    return None


@torch.no_grad()
def hold(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Round all parameters to a type, and hold those of large layers in it; changes the model.

    A matrix that other kinds of layers use, too (tied, or of a class that is not known here), stays
    float32. Call it before `adapters.adapt`.

    Args:
        model: on the CPU, in float32 or already in this type; its buffers stay as they are.
        dtype: bfloat16; float32 changes nothing.
    """
    if dtype == torch.float32 or is_held(model):
        return model
    kept = _holdable(model)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            wanted = dtype if id(parameter) in kept else torch.float32
            if name != "weight" or _held(module) is None:
                wanted = torch.float32
            value = parameter.detach()
            if value.dtype != dtype:
                value = value.to(dtype)
            if value.dtype != wanted:
                value = value.to(wanted)
            parameter.data = value
        kind = _held(module)
        weight = getattr(module, "weight", None)
        if kind is not None and weight is not None and weight.dtype == dtype:
            module.__class__ = kind
    return model


def is_held(model: nn.Module) -> bool:
    """Whether `hold` was called for a model, and `release` not."""
    return any(isinstance(module, _HELD) for module in model.modules())


def _holdable(model: nn.Module) -> set[int]:
    """Ids of the matrices that only layers of known classes have."""
    known: set[int] = set()
    others: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            held = name == "weight" and _held(module) is not None
            (known if held else others).add(id(parameter))
    return known - others


@torch.no_grad()
def release(model: nn.Module) -> nn.Module:
    """Undo `hold`, at twice the memory: float32 weights with the same values."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dtype != torch.float32:
                parameter.data = parameter.detach().float()
        kind: Any = type(module)
        if kind in (_HeldLinear, _HeldConv1D):
            kind = kind.__base__
        elif issubclass(kind, _HeldEmbedding):
            kind = kind.__bases__[1]
        module.__class__ = kind
    return model
