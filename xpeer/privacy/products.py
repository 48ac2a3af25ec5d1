"""Products of factors that the layers computed in 16 bits, in float32.

A product of two bfloat16 numbers is exact in float32. So a device that multiplies matrices of
float32 by way of bfloat16 (a processor), or of TF32, which has as many bits and more (a GPU), and
adds up in float32, gives what float32 gives, up to the order of the sum. On a processor with such
instructions it takes less than half the time.

Such instructions may count numbers below 2^-126 as zero. That is nothing beside the others, unless
the other factor is huge; then all is done in float32, or a record could exceed its norm unseen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor

_WAYS: Final[dict[str, tuple[Any, str]]] = {
    "cpu": (torch.backends.mkldnn.matmul, "bf16"),  # type: ignore[attr-defined]
    "cuda": (torch.backends.cuda.matmul, "tf32"),
}
"""torch's setting for matrices of float32, and what is exact for bfloat16, by kind of device."""


_MAGNITUDE: Final = 0x7FFF
"""All bits of a bfloat16 but the sign. As integers they are in the order of the numbers."""
_LARGE: Final = 32
"""Products of narrower matrices, such as those of adapters, take no longer than a look at them."""
_HUGE: Final = int(torch.tensor(2.0**60, dtype=torch.bfloat16).view(torch.int16))


def bmm(one: Tensor, two: Tensor) -> Tensor:
    """Multiply matrices of B records: (B, n, m) and (B, m, k), of any float type -> (B, n, k)
    float32.
    """
    n, k = one.shape[1], two.shape[2]
    if n * k >= _LARGE * (n + k) and _is_exact(one) and _is_exact(two):
        with _by_way_of_fewer_bits(one.device.type):
            return torch.bmm(one.float(), two.float())
    return torch.bmm(one.float(), two.float())


def _is_exact(factor: Tensor) -> bool:
    """Whether a factor loses nothing that matters. A GPU keeps small numbers, and is not asked."""
    if factor.dtype != torch.bfloat16 or factor.device.type not in _WAYS:
        return False
    if factor.device.type != "cpu" or not factor.numel():
        return True
    as_stored = factor if factor.is_contiguous() else factor.mT
    return int((as_stored.view(torch.int16) & _MAGNITUDE).max()) <= _HUGE


@contextmanager
def _by_way_of_fewer_bits(kind: str) -> Iterator[None]:
    """The setting is the process's; no other thread multiplies matrices of float32."""
    setting, way = _WAYS[kind]
    before = setting.fp32_precision
    setting.fp32_precision = way
    try:
        yield
    finally:
        setting.fp32_precision = before
