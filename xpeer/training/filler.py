"""Initial values for a model that is about to be given others: made in a moment, none of them
drawn.

A family's own code computes its buffers and sets norms to one, biases to zero. It is let do so;
only where it would draw a tensor, it is given values out of a small table. They are no worse than
drawn ones for what is tried before the true ones come (engines against autograd, causality).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_VALUES: Final = 65537
"""A prime: two rows of a matrix begin alike only if they are so many apart."""
_SHIFT: Final = 7919
"""Between two tensors."""


class Filler(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's
    """While it is entered, tensors on the CPU are filled where torch would draw them."""

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
        """Called by torch for each operation."""
        given = dict(kwargs or {})
        aten = torch.ops.aten
        if func in (aten.normal_.default, aten.uniform_.default):
            (out, *bounds) = args
            names = ("mean", "std") if func is aten.normal_.default else ("from", "to")
            if out.device.type == "cpu" and out.is_contiguous() and out.is_floating_point():
                first = float(bounds[0] if bounds else given.get(names[0], 0.0))
                second = float(bounds[1] if len(bounds) > 1 else given.get(names[1], 1.0))
                if func is aten.normal_.default:
                    return self._fill(out, self._normal * second + first)
                return self._fill(out, self._uniform * (second - first) + first)
        return func(*args, **given)

    def _fill(self, out: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        values = values.roll(-_SHIFT * self._filled)
        self._filled += 1
        flat = out.detach().view(-1)
        whole = len(flat) // _VALUES * _VALUES
        flat[:whole].view(-1, _VALUES).copy_(values)
        flat[whole:].copy_(values[: len(flat) - whole])
        return out
