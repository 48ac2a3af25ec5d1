"""Pseudo-random numbers for stochastic rounding: a hash of seed, block and column.

They are counter-based (Salmon et al. 2011): they need no memory, no order and no state, and are the
same in compiled and plain code, in one chunk or many. They use 32-bit integers, which vectorise.

They are no secret and hide nothing: whoever knows the seed can subtract them. They are not privacy
noise.
"""

from __future__ import annotations

import torch

from xpeer.wire.splitmix import splitmix64


def keys(seed: int, blocks: int) -> torch.Tensor:
    """A hash of seed and block number for each block, (blocks,) int32.

    Args:
        seed: any integer; its low 64 bits count.
        blocks: how many.
    """
    words = splitmix64(seed)
    low, high = _signed(words & 0xFFFFFFFF), _signed(words >> 32)
    return _mix(_mix(torch.arange(blocks, dtype=torch.int32) + low) + high)


def uniform(width: int, keys: torch.Tensor) -> torch.Tensor:
    """(rows, width) float32 in [0, 1), multiples of 2^-24: one row per key."""
    column = torch.arange(width, dtype=torch.int32, device=keys.device)
    return ((_mix(keys.unsqueeze(1) + column) >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Wellons's lowbias32: int32 to int32, one to one, every bit depending on every other."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975
    return x ^ ((x >> 16) & 0xFFFF)


def _signed(word: int) -> int:
    """The value of 32 bits as a signed integer, as torch's int32 has it."""
    return word - (word >> 31 << 32)
