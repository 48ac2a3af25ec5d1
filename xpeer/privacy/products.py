"""Products of factors that the layers computed in 16 bits, in float32.

A product of two bfloat16 numbers is exact in float32. A GPU multiplies such factors as they are,
and adds up in float32. A processor multiplies matrices of float32 by way of bfloat16, if torch is
told to, and adds up in float32, too. Both give what float32 gives, up to the order of the sum. On a
processor it takes less than half the time; without AMX torch then uses a faster library of float32.

Such instructions may count numbers below 2^-126 as zero. That is nothing beside the others, unless
the other factor is huge; then all is done in float32, or a record could exceed its norm unseen.

What a processor is told holds for all threads. So none other may multiply matrices of float32
meanwhile, and what is measured beside training does so in `multiplying_elsewhere`. A GPU is told
nothing: torch's compiler puts its setting back to what it was when a compilation began, whoever
changed it since.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor

_SETTING: Final[Any] = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
"""torch's for products of float32 on a processor, in all threads."""
_EXACT_ON: Final = ("cpu", "cuda")
"""Devices that multiply bfloat16 numbers exactly."""
_MAGNITUDE: Final = 0x7FFF
"""All bits of a bfloat16 but the sign. As integers they are in the order of the numbers."""
_LARGE: Final = 32
"""Products of narrower matrices, such as those of adapters, take no longer than a look at them."""
_HUGE: Final = int(torch.tensor(2.0**60, dtype=torch.bfloat16).view(torch.int16))


class _Elsewhere:
    """Other threads that multiply matrices of float32 on a processor.

    Attributes:
        lock: held while their number changes, and while the setting is not the usual one.
    """

    lock, threads = threading.Lock(), 0


@contextmanager
def multiplying_elsewhere() -> Iterator[None]:
    """Meanwhile this thread, which takes no steps, gets float32 of float32."""
    with _Elsewhere.lock:
        _Elsewhere.threads += 1
    try:
        yield
    finally:
        with _Elsewhere.lock:
            _Elsewhere.threads -= 1


def bmm(one: Tensor, two: Tensor) -> Tensor:
    """Multiply matrices of B records: (B, n, m) and (B, m, k), of any float type -> (B, n, k)
    float32.
    """
    n, k = one.shape[1], two.shape[2]
    if n * k >= _LARGE * (n + k) and _is_exact(one) and _is_exact(two):
        if one.device.type == "cuda":
            return torch.bmm(one, two, out_dtype=torch.float32)
        return _by_way_of_bfloat16(one.float(), two.float())
    return torch.bmm(one.float(), two.float())


def _is_exact(factor: Tensor) -> bool:
    """Whether a factor loses nothing that matters. A GPU keeps small numbers, and is not asked."""
    if factor.dtype != torch.bfloat16 or factor.device.type not in _EXACT_ON:
        return False
    if factor.device.type != "cpu" or not factor.numel():
        return True
    as_stored = factor if factor.is_contiguous() else factor.mT
    return int((as_stored.view(torch.int16) & _MAGNITUDE).max()) <= _HUGE


def _by_way_of_bfloat16(one: Tensor, two: Tensor) -> Tensor:
    """Multiply on a processor. Beside a thread that multiplies as well, it takes longer."""
    with _Elsewhere.lock:
        if not _Elsewhere.threads:
            before = _SETTING.fp32_precision
            _SETTING.fp32_precision = "bf16"
            try:
                return torch.bmm(one, two)
            finally:
                _SETTING.fp32_precision = before
    return torch.bmm(one, two)
