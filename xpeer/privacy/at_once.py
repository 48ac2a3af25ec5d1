"""How many values are computed at once: few on a processor, for its caches; many on other devices.

An estimate has a step computed without values, on a processor, and wants the memory of a GPU. So
code that treats devices differently asks here which one it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Final, Literal

import torch

DeviceKind = Literal["cpu", "cuda"]
"""A processor, or any other device: those are all treated alike."""
_LEAST: Final = 1 << 4
"""Part of the usual values to which `halve` goes down."""

_rehearsed: ContextVar[DeviceKind | None] = ContextVar("rehearsed", default=None)


class _Part:
    """Attributes:
    divisor: of the usual values, on devices that are no processors.
    """

    divisor = 1


def kind_of(device: torch.device) -> DeviceKind:
    """The kind of a device, or that which is rehearsed."""
    return _rehearsed.get() or ("cpu" if device.type == "cpu" else "cuda")


@contextmanager
def rehearsed_as(kind: DeviceKind) -> Iterator[None]:
    """Meanwhile all tensors count as being on such a device."""
    before = _rehearsed.set(kind)
    try:
        yield
    finally:
        _rehearsed.reset(before)


def values_at_once(device: torch.device, on_processor: int, elsewhere: int) -> int:
    """Values to compute at once, of these two numbers."""
    if kind_of(device) == "cpu":
        return on_processor
    return max(1, elsewhere // _Part.divisor)


def halve(device: torch.device) -> str:
    """Compute half as many values at once from now on, for a device that is short of memory.

    Returns:
        What changed, in words for the log; "" = nothing: there are few already.
    """
    if device.type == "cpu" or _Part.divisor >= _LEAST:
        return ""
    _Part.divisor *= 2
    return "fewer logits at a time"
