"""Frozen matrices in 8 or 4 bits, by bitsandbytes, computed with in the input's precision.

A layer gets its matrix back when it is used, forward and backward, and keeps no copy of it. Inputs
are never quantised: how bitsandbytes' own 8-bit layer treats a record depends on the other records
of the batch, and nobody could then say what a single one changes. So gradients are those of
a model with the same values in float32.

Embeddings, the output layer, norms and biases stay as `held` has them.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from xpeer.errors import ConfigError
from xpeer.manifest.model import QUANTISED, BaseDtype
from xpeer.needs import installing
from xpeer.training.held import product

_LOGGER: Final = "bitsandbytes"


class Library(Protocol):
    """Makes codes and scales of a matrix, and the matrix of them."""

    def quantise(self, weight: Tensor, kind: str, block: int) -> tuple[Tensor, Tensor]:
        """Quantise (m, n) bfloat16; returns uint8 codes, and a float32 scale for each block."""

    def values(self, layer: QuantisedLinear, dtype: torch.dtype) -> Tensor:
        """Make the matrix of a layer, (m, n), of a type."""


class BitsAndBytes:
    """The library.

    Raises:
        ConfigError: it is not installed, or does not work here.
    """

    def __init__(self) -> None:
        log = logging.getLogger(_LOGGER)
        before = log.level
        log.setLevel(logging.ERROR)  # it advises other packages for a use that is not ours
        try:
            made = importlib.import_module("bitsandbytes.functional")  # an extra, and slow
        except Exception as e:  # a broken one raises whatever it meets: OSError, RuntimeError
            raise ConfigError(
                "this swarm holds frozen weights in 8 or 4 bits (model.base_dtype), and "
                f"bitsandbytes can't be used: {' '.join(str(e).split())[:200]}",
                installing("quantised"),
            ) from e
        finally:
            log.setLevel(before)
        self._bits: Any = made
        self._line = made.create_linear_map()  # (256,) float32: evenly spaced from -1 to 1

    def quantise(self, weight: Tensor, kind: str, block: int) -> tuple[Tensor, Tensor]:
        """See `Library`. A block is a row here: of rows that are shorter than a block, version
        0.50.2 makes wrong values on a CPU with AVX-512.
        """
        rows = functional.pad(weight.flatten(), [0, -weight.numel() % block]).view(-1, block)
        if kind == "nf4":
            codes, state = self._bits.quantize_4bit(rows, blocksize=block, quant_type="nf4")
        else:
            codes, state = self._bits.quantize_blockwise(rows, code=self._line, blocksize=block)
        return codes, state.absmax

    def values(self, layer: QuantisedLinear, dtype: torch.dtype) -> Tensor:
        """See `Library`."""
        bits, codes, scales = self._bits, layer.codes, layer.scales
        known = {"absmax": scales, "blocksize": layer.block, "dtype": dtype}
        if layer.kind == "nf4":
            rows = torch.Size([len(scales), layer.block])
            state = bits.QuantState(shape=rows, quant_type="nf4", **known)
            made: Tensor = bits.dequantize_4bit(codes, state)
        else:
            if self._line.device != codes.device:
                self._line = self._line.to(codes.device)
            made = bits.dequantize_blockwise(codes, bits.QuantState(code=self._line, **known))
        return made.view(-1)[: layer.shape.numel()].view(layer.shape)


class Shapes:
    """In place of the library: what it makes has the right size, and no values."""

    def quantise(self, weight: Tensor, kind: str, block: int) -> tuple[Tensor, Tensor]:
        """See `Library`."""
        size = -(-weight.numel() // block) * block
        codes = weight.new_empty(size // 2 if kind == "nf4" else size, dtype=torch.uint8)
        return codes, weight.new_empty(size // block, dtype=torch.float32)

    def values(self, layer: QuantisedLinear, dtype: torch.dtype) -> Tensor:
        """See `Library`."""
        return layer.codes.new_empty(layer.shape, dtype=dtype)


class QuantisedLinear(nn.Linear):
    """A linear layer whose matrix is held as codes and scales.

    Attributes:
        codes: uint8, as the library packs them.
        scales: one for each block, float32.
        shape: of the matrix, (features out, features in).
        kind: int8 or nf4.
        block: values under one scale.
        library: makes the matrix.
    """

    codes: Tensor
    scales: Tensor
    shape: torch.Size
    kind: str
    block: int
    library: Library

    @property
    def weight(self) -> Tensor:  # type: ignore[override] # no parameter, and not to be replaced
        """The codes. peft asks them for their device; nobody can multiply by them."""
        return self.codes

    def values(self, dtype: torch.dtype) -> Tensor:
        """The matrix, (m, n), of a type."""
        return self.library.values(self, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Multiply, in the input's type, or in autocast's."""
        if torch.is_autocast_enabled(input.device.type):
            input = input.to(torch.get_autocast_dtype(input.device.type))
        return product(input, self.values, self.bias)


@torch.no_grad()
def quantise(
    model: nn.Module, dtype: BaseDtype, block: int, library: Library | None = None
) -> nn.Module:
    """Replace the matrices of linear layers by codes; changes the model, one layer at a time.

    Call it after `held.hold`, and before `adapters.adapt`. A matrix that several layers use stays
    as it is. So does the output layer's: no layer after it averages its errors out.

    Args:
        model: of transformers, on the CPU: there all members with the same library make the same
            codes, whatever device they train on.
        dtype: int8 or nf4; another one changes nothing.
        block: `model.base_block` of the manifest.
        library: None = bitsandbytes.

    Raises:
        ConfigError: bitsandbytes is needed, and can't be used.
    """
    if dtype not in QUANTISED:
        return model
    library = library or BitsAndBytes()
    for module in _quantisable(model):
        weight: Any = module.weight
        if isinstance(module, Conv1D):  # transformers' GPT-2: W is (in, out)
            weight = weight.T.contiguous()
            module.out_features, module.in_features = weight.shape
        codes, scales = library.quantise(weight.detach().to(torch.bfloat16), dtype, block)
        del module._parameters["weight"]
        module.__class__ = QuantisedLinear
        made: Any = module
        made.register_buffer("codes", codes)
        made.register_buffer("scales", scales)
        made.shape, made.kind, made.block, made.library = weight.shape, dtype, block, library
    return model


def num_values(model: nn.Module) -> int:
    """Number of values that are held as codes."""
    return sum(m.shape.numel() for m in model.modules() if isinstance(m, QuantisedLinear))


def num_quantisable(model: nn.Module) -> int:
    """Number of values that `quantise` would hold as codes."""
    return sum(module.weight.numel() for module in _quantisable(model))


def saved_bytes(model: nn.Module) -> int:
    """Bytes by which codes and scales are less than the same matrices in bfloat16."""
    layers = [m for m in model.modules() if isinstance(m, QuantisedLinear)]
    here = sum(m.codes.nbytes + m.scales.nbytes for m in layers)
    return torch.bfloat16.itemsize * num_values(model) - here


def _quantisable(model: Any) -> list[Any]:
    """Linear layers whose matrix is theirs alone, but for the output layer."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    output = model.get_output_embeddings()
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not output
        and type(module).__name__ in _KNOWN
        and len(owners[id(module.weight)]) == 1
    ]


_KNOWN: Final = ("Linear", "Conv1D", "_HeldLinear", "_HeldConv1D")
"""Classes that multiply, and do nothing else. Others may read their matrix in ways of their own."""
