"""Products of factors that the layers computed in 16 bits, in float32.

A product of two bfloat16 numbers is exact in float32. So a device that multiplies matrices of
float32 by way of bfloat16 (a processor), or of TF32, which has as many bits and more (a GPU), and
adds up in float32, gives what float32 gives, up to the order of the sum. On a processor with such
instructions it takes less than half the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor

_WAYS: Final[dict[str, tuple[Any, str]]] = {
    "cpu": (torch.backends.mkldnn.matmul, "bf16"),
    "cuda": (torch.backends.cuda.matmul, "tf32"),
}
"""torch's setting for matrices of float32, and what is exact for bfloat16, by kind of device."""


def bmm(one: Tensor, two: Tensor) -> Tensor:
    """Multiply matrices of B records: (B, n, m) and (B, m, k), of any float type -> (B, n, k)
    float32.
    """
    if one.dtype == two.dtype == torch.bfloat16 and one.device.type in _WAYS:
        with _by_way_of_fewer_bits(one.device.type):
            return torch.bmm(one.float(), two.float())
    return torch.bmm(one.float(), two.float())


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
