"""A model's trainable parameters as one flat vector; the order in which all peers see them.

The order is `named_parameters()`, tied weights once, trainable ones only; it is the same at every
peer because the manifest fixes the config.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from xpeer.errors import LocalError
from xpeer.identity import blake2b


class FlatParameters:
    """A model's trainable parameters as one vector of `num_params` float32 values.

    Build it on the model itself, not on a wrapper. It keeps the parameters, not the model, and so
    stays valid when the model is wrapped later (opacus) or moved to another device.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._parameters = _trained(model)
        for p in self._parameters:
            if not p.is_contiguous():  # a view of it would silently be a copy
                p.data = p.data.contiguous()
        sizes = torch.tensor([0, *(p.numel() for p in self._parameters)])
        self._bounds = sizes.cumsum(0)  # (len(parameters) + 1,) int64
        self.num_params = int(self._bounds[-1])

    def parameters(self) -> list[torch.nn.Parameter]:
        """In flat order."""
        return list(self._parameters)

    @torch.no_grad()
    def read(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """Copy all to (num_params,) float32 on the CPU, into `out` if given."""
        if out is None:
            out = torch.empty(self.num_params, dtype=torch.float32)
        self._check(out)
        for p, low, high in self._spans():
            out[low:high].copy_(p.view(-1))
        return out

    @torch.no_grad()
    def write(self, flat: torch.Tensor) -> None:
        """Replace all by (num_params,) float32 from the CPU."""
        self._check(flat)
        for p, low, high in self._spans():
            p.view(-1).copy_(flat[low:high])

    @torch.no_grad()
    def gather(self, indices: torch.Tensor) -> torch.Tensor:
        """Copy some to the CPU.

        Args:
            indices: (n,) int32 or int64, CPU, sorted, each at most once.

        Returns:
            (n,) float32, CPU.
        """
        out = torch.empty(indices.numel(), dtype=torch.float32)
        for p, low, high, local in self._hits(indices):
            out[low:high].copy_(p.view(-1).index_select(0, local))
        return out

    @torch.no_grad()
    def add_(self, indices: torch.Tensor, values: torch.Tensor) -> None:
        """Add to some, on the device.

        Args:
            indices: as for `gather`.
            values: (n,) float32, CPU.
        """
        for p, low, high, local in self._hits(indices):
            p.view(-1).index_add_(0, local, values[low:high].to(p.device, p.dtype))

    def read_gradients(self) -> torch.Tensor:
        """Copy all gradients to (num_params,) float32 on the CPU; a missing one is zero."""
        out = torch.zeros(self.num_params, dtype=torch.float32)
        for p, low, high in self._spans():
            if p.grad is not None:
                out[low:high].copy_(p.grad.view(-1))
        return out

    def write_gradients(self, flat: torch.Tensor) -> None:
        """Replace all gradients by (num_params,) float32 from the CPU."""
        self._check(flat)
        for p, low, high in self._spans():
            p.grad = flat[low:high].to(p.device, p.dtype, copy=True).view_as(p)

    def digest(self) -> str:
        """See `digest`."""
        return digest(self.read())

    def _spans(self) -> Iterator[tuple[torch.nn.Parameter, int, int]]:
        bounds = self._bounds.tolist()
        return zip(self._parameters, bounds[:-1], bounds[1:], strict=True)

    def _hits(
        self, indices: torch.Tensor
    ) -> Iterator[tuple[torch.nn.Parameter, int, int, torch.Tensor]]:
        """For every parameter that is hit: the range of `indices`, and positions within it."""
        cuts = torch.searchsorted(indices, self._bounds.to(indices.dtype)).tolist()
        for (p, start, _), low, high in zip(self._spans(), cuts[:-1], cuts[1:], strict=True):
            if low < high:
                yield p, low, high, (indices[low:high] - start).to(p.device)

    def _check(self, flat: torch.Tensor) -> None:
        if flat.shape != (self.num_params,) or flat.dtype != torch.float32:
            raise LocalError(
                f"a flat vector of {tuple(flat.shape)} {flat.dtype} does not fit a model of "
                f"{self.num_params} float32 parameters",
                "it belongs to another model",
            )


def read_flat(model: torch.nn.Module, out: torch.Tensor | None = None) -> torch.Tensor:
    """All trainable parameters as (num_params,) float32 on the CPU, into `out` if given."""
    return FlatParameters(model).read(out)


def write_flat(model: torch.nn.Module, flat: torch.Tensor) -> None:
    """Replace all trainable parameters by (num_params,) float32."""
    FlatParameters(model).write(flat)


def digest(flat: torch.Tensor) -> str:
    """`identity.blake2b` (256 bits) of (n,) float32 on the CPU, as little endian bytes; hex."""
    values = flat.detach().contiguous().numpy().astype("<f4", copy=False)
    return blake2b(values.data.cast("B")).hex()


def num_params(model: torch.nn.Module) -> int:
    """P: trainable parameters, tied ones once."""
    return sum(p.numel() for p in _trained(model))


def _trained(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for _, p in model.named_parameters() if p.requires_grad]
