"""Fills a new model quickly with random values that are replaced soon.

The model's own code computes its buffers, and sets norms to one and biases to zero, as usual. Only
where it would draw a tensor, it gets values from a small table. They are good enough for the checks
that come before the real values (engines against autograd, causality).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_VALUES: Final = 65537
"""Size of the table. It is prime, so that two rows of a matrix begin alike only if their distance
is a multiple of it."""
_SHIFT: Final = 7919
"""Shift of the table between two tensors."""


class Filler(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's
    """Fills tensors on the CPU where torch would draw them, within its `with` block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        generator = torch.Generator().manual_seed(1)
        self._normal = torch.randn(_VALUES, generator=generator)
        self._uniform = torch.rand(_VALUES, generator=generator)
        self._filled = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Carry out an operation; torch calls this for each."""
        options = dict(kwargs or {})
        aten = torch.ops.aten
        if func in (aten.normal_.default, aten.uniform_.default):
            (out, *bounds) = args
            names = ("mean", "std") if func is aten.normal_.default else ("from", "to")
            if out.device.type == "cpu" and out.is_contiguous() and out.is_floating_point():
                first = float(bounds[0] if bounds else options.get(names[0], 0.0))
                second = float(bounds[1] if len(bounds) > 1 else options.get(names[1], 1.0))
                if func is aten.normal_.default:
                    return self._fill(out, self._normal * second + first)
                return self._fill(out, self._uniform * (second - first) + first)
        return func(*args, **options)

    def _fill(self, out: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        values = values.roll(-_SHIFT * self._filled)
        self._filled += 1
        flat = out.detach().view(-1)
        whole = len(flat) // _VALUES * _VALUES
        flat[:whole].view(-1, _VALUES).copy_(values)
        flat[whole:].copy_(values[: len(flat) - whole])
        return out
