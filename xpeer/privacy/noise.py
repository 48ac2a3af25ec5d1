"""Noise and sampling that nobody can replay: every bit comes from the operating system.

A partner who could reproduce the noise would subtract it. So nothing here has a seed that could be
stored, checkpointed, logged or shared, and there is no state to copy. torch's own generators won't
do on a CPU: `manual_seed` keeps 32 of its 64 bits, which can be searched, the Mersenne Twister is
linear, and float32 normals end at 5.8 standard deviations.

Cost: the kernel's ChaCha20 and a float64 Box-Muller transform take about 40 ns a value on one CPU
thread: some 5 % of a step with 64 records of 128 tokens.

What this module does not give: protection against an observer of the lowest bits of the sums
(Mironov 2012, "On significance of the least significant bits for differential privacy").
"""

from __future__ import annotations

import math
import os
from fractions import Fraction
from typing import Any, Final, NoReturn

import torch
from torch import Tensor

from xpeer.errors import LocalError

_CHUNK: Final = 1 << 16
"""Pairs of normals made at once; their temporaries stay in the processor's cache."""
_MANTISSA: Final = 53


class SecretGenerator:
    """Gaussian noise and Poisson samples. Can be neither copied nor pickled.

    Args:
        device: of the tensors to fill. On CUDA a Philox generator is keyed afresh, with 64 bits
            from the operating system, for every tensor; elsewhere every value has bits of its own.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        device = torch.device(device)
        self._philox = torch.Generator(device) if device.type == "cuda" else None

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled."""
        raise TypeError("a SecretGenerator can't be copied or stored: noise must not be repeated")

    def __copy__(self) -> NoReturn:
        """Refuse to be copied."""
        self.__reduce__()

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        """Refuse to be copied."""
        self.__reduce__()

    @torch.no_grad()
    def gaussian_(self, tensor: Tensor, std: float) -> Tensor:
        """Fill a floating tensor with independent N(0, std^2).

        Raises:
            LocalError: std is not a finite positive number.
        """
        if not (math.isfinite(std) and std > 0):
            raise LocalError(f"privacy noise: standard deviation {std!r} is out of range")
        if self._philox is not None and tensor.device.type == "cuda":
            self._philox.manual_seed(int.from_bytes(os.urandom(8), "little"))
            wide = torch.empty(tensor.shape, dtype=torch.float64, device=tensor.device)
            return tensor.copy_(wide.normal_(0.0, std, generator=self._philox))
        normals = torch.empty(tensor.numel(), dtype=tensor.dtype)
        for start in range(0, len(normals), 2 * _CHUNK):
            part = normals[start : start + 2 * _CHUNK]
            pairs = -(-len(part) // 2)
            part.copy_(_box_muller(pairs)[: len(part)].mul_(std))
        return tensor.copy_(normals.view(tensor.shape))

    def poisson_sample(self, num_records: int, probability: float) -> Tensor:
        """Choose each record independently with this probability.

        Exact but for rounding the probability down by less than 2^-64: two random bytes decide a
        record, and six more those that are undecided.

        Args:
            num_records: how many there are.
            probability: q, in [0, 1].

        Returns:
            Indices in ascending order, (m,) int64, CPU; m may be 0.
        """
        if num_records < 0 or not 0.0 <= probability <= 1.0:
            raise LocalError(f"privacy sampling: q = {probability!r} of {num_records} records")
        threshold = math.floor(Fraction(probability) * 2**64)
        high, low = threshold >> 48, threshold & ((1 << 48) - 1)
        if num_records == 0 or high == 1 << 16:
            return torch.arange(num_records)
        draws = torch.frombuffer(bytearray(os.urandom(2 * num_records)), dtype=torch.int16)
        limit = high - (1 << 15)  # int16 counts from -2^15
        chosen = draws < limit
        for i in (draws == limit).nonzero().flatten().tolist():
            chosen[i] = int.from_bytes(os.urandom(6), "little") < low
        return chosen.nonzero().flatten()

    def shuffled(self, num_records: int) -> Tensor:
        """A permutation, (n,) int64, CPU. Ties of the 64-bit keys are left as they come."""
        keys = torch.frombuffer(bytearray(os.urandom(8 * max(1, num_records))), dtype=torch.int64)
        return keys[:num_records].argsort()


def _box_muller(pairs: int) -> Tensor:
    """(2 pairs,) float64 standard normals from 2 x 53 bits a pair (Box and Muller 1958)."""
    bits = torch.frombuffer(bytearray(os.urandom(16 * pairs)), dtype=torch.int64)
    uniform = (bits & ((1 << _MANTISSA) - 1)).double()
    radius = uniform[:pairs].add_(1.0).mul_(2.0**-_MANTISSA).log_().mul_(-2.0).sqrt_()
    angle = uniform[pairs:].mul_(2.0 * math.pi * 2.0**-_MANTISSA)
    return torch.cat([angle.cos().mul_(radius), angle.sin().mul_(radius)])
