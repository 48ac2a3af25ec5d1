"""A model's trainable parameters as one flat vector, in an order that all peers share.

The order is that of `named_parameters()`, with tied weights once and trainable ones only. It is the
same at every peer because the manifest fixes the config.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import torch

from xpeer.errors import LocalError
from xpeer.identity import blake2b
from xpeer.mixing.cut import padded
from xpeer.mixing.fragments import Fragments

_PIECE: Final = 1 << 22
"""Values that are converted at a time."""


class FlatVector:
    """A vector that is read and changed as a whole, or by fragments in a few strided passes.

    Args:
        num_params: P.
        num_fragments: F.
        device: where the vector lies; it is zero at first.

    Attributes:
        num_params: P.
        fragments: how the vector is cut.

    Raises:
        LocalError: too many fragments.
    """

    def __init__(
        self, num_params: int, num_fragments: int, device: torch.device | str = "cpu"
    ) -> None:
        self.num_params = num_params
        self.fragments = Fragments(num_params, num_fragments)
        self._flat = torch.zeros(padded(num_params), dtype=torch.float32, device=device)

    def gather(self, fragment: int, out: torch.Tensor) -> torch.Tensor:
        """Copy a fragment to `out`, (size,) float32 on the CPU; returns it."""
        return self.fragments.gather(self._flat, fragment, out)

    def add_(self, fragment: int, values: torch.Tensor, scale: float = 1.0) -> None:
        """Add scale times (size,) float32 from the CPU to a fragment."""
        self.fragments.add_(self._flat, fragment, values, scale)

    def read(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """Copy the vector to (num_params,) float32 on the CPU, into `out` if given."""
        if out is None:
            out = torch.empty(self.num_params, dtype=torch.float32)
        _check(out, self.num_params)
        return out.copy_(self._flat[: self.num_params])

    def write(self, flat: torch.Tensor) -> None:
        """Replace the vector by (num_params,) float32 from the CPU."""
        _check(flat, self.num_params)
        self._flat[: self.num_params].copy_(flat)


class FlatParameters(FlatVector):
    """A model's trainable parameters, moved into one vector; they become views of it.

    Build it on the model itself, not on a wrapper, on its final device. It keeps the parameters,
    not the model, and so stays valid when the model is wrapped later.

    Args:
        model: has the parameters.
        num_fragments: F.

    Raises:
        LocalError: the parameters have several types or devices, or there are too many fragments.
    """

    def __init__(self, model: torch.nn.Module, num_fragments: int = 1) -> None:
        self._parameters = trained(model)
        kinds = {(p.dtype, p.device) for p in self._parameters}
        if len(kinds) != 1 or kinds.pop()[0] != torch.float32:
            raise LocalError("the model's parameters are not all float32 on one device")
        device = self._parameters[0].device
        super().__init__(sum(p.numel() for p in self._parameters), num_fragments, device)
        with torch.no_grad():
            for p, view in zip(self._parameters, views(self._parameters, self._flat), strict=True):
                view.copy_(p)
                p.data = view

    def parameters(self) -> list[torch.nn.Parameter]:
        """List the parameters in flat order."""
        return list(self._parameters)

    def read_gradients(self) -> torch.Tensor:
        """Copy all gradients to (P padded with zeros to whole lines,) float32 on the CPU.

        A missing gradient counts as zero.
        """
        out = torch.zeros(self._flat.numel(), dtype=torch.float32)
        for p, view in zip(self._parameters, views(self._parameters, out), strict=True):
            if p.grad is not None:
                view.copy_(p.grad)
        return out

    def write_gradients(self, flat: torch.Tensor) -> None:
        """Replace all gradients by a vector of the shape of `read_gradients`, from the CPU.

        Where there are gradients, this takes no memory.
        """
        for p, view in zip(self._parameters, views(self._parameters, flat), strict=True):
            if p.grad is None:
                p.grad = view.to(p.device, copy=True)
            else:
                p.grad.copy_(view)

    @contextmanager
    def with_values(self, values: torch.Tensor) -> Iterator[None]:
        """Have the model compute with these (num_params,) float32, CPU, within the block."""
        own = self.read()
        self.write(values)
        try:
            yield
        finally:
            self.write(own)

    def digest(self) -> str:
        """Hash the parameters; see the function `digest`."""
        return digest(self.read())


@torch.no_grad()
def read_flat(model: torch.nn.Module) -> torch.Tensor:
    """Copy all trainable parameters to (num_params,) float32 on the CPU."""
    parameters = trained(model)
    out = torch.empty(sum(p.numel() for p in parameters), dtype=torch.float32)
    for p, view in zip(parameters, views(parameters, out), strict=True):
        view.copy_(p)
    return out


@torch.no_grad()
def write_flat(model: torch.nn.Module, flat: torch.Tensor) -> None:
    """Replace all trainable parameters by (num_params,) float32."""
    parameters = trained(model)
    _check(flat, sum(p.numel() for p in parameters))
    for p, view in zip(parameters, views(parameters, flat), strict=True):
        p.copy_(view)


def digest(flat: torch.Tensor) -> str:
    """BLAKE2b-256, in hex, of (n,) float32 on the CPU as little endian bytes."""
    values = flat.detach().contiguous().numpy().astype("<f4", copy=False)
    return blake2b(values.data.cast("B")).hex()


def digest_of(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> str:
    """Hash a model's trainable parameters as values of a type, little endian, piece by piece.

    In float32 this is `digest(read_flat(model))`, without a copy of all values.
    """
    return digest_of_all(trained(model), dtype)


def digest_of_all(tensors: Sequence[torch.Tensor], dtype: torch.dtype = torch.float32) -> str:
    """Hash the values of tensors as `digest_of` does."""
    size = dtype.itemsize * sum(tensor.numel() for tensor in tensors)
    found = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=32)  # as `identity.blake2b`
    for piece in _pieces(tensors):
        values = piece.to("cpu", dtype).contiguous().view(torch.uint8)
        found.update(values.numpy().data)
    return found.hexdigest()


def _pieces(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The values of tensors, flat, at most `_PIECE` at a time."""
    for tensor in tensors:
        yield from torch.split(tensor.detach().reshape(-1), _PIECE)


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is infinite or NaN; takes no memory, where `torch.isfinite` takes 7 bytes
    a value.
    """
    if not values.numel():
        return True
    least, most = torch.aminmax(values.detach())  # NaN if a value is
    return bool(torch.isfinite(least) & torch.isfinite(most))


def num_params(model: torch.nn.Module) -> int:
    """P: number of trainable parameters, tied ones counted once."""
    return sum(p.numel() for p in trained(model))


def trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The trainable parameters in flat order, tied ones once."""
    return [p for _, p in model.named_parameters() if p.requires_grad]


def views(parameters: list[torch.nn.Parameter], flat: torch.Tensor) -> list[torch.Tensor]:
    """Views of a flat vector, one for each parameter and in its shape."""
    sizes = [p.numel() for p in parameters]
    parts = torch.split(flat[: sum(sizes)], sizes)
    return [part.view(p.shape) for p, part in zip(parameters, parts, strict=True)]


def _check(flat: torch.Tensor, num_params: int) -> None:
    if flat.shape != (num_params,) or flat.dtype != torch.float32:
        raise LocalError(
            f"a flat vector of {tuple(flat.shape)} {flat.dtype} does not fit a model of "
            f"{num_params} float32 parameters",
            "it belongs to another model",
        )
