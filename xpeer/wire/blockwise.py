"""Blockwise quantisation: the format of the int codecs, and its arithmetic on rows of blocks.

128 values in a row share one float16 step s. A value x becomes the integer k = round(x / s) with
|k| <= 2^(b-1) - 1, of which the low b bits travel.

The functions of this module take (rows, 128) tensors and write into tensors of the caller.
`kernels` compiles the same functions. Compiled and plain code give the same bits by design: each
result is one IEEE operation away from its operands, and nothing may be contracted or reordered
except sums of integers. (Sums of squares do depend on the order. They are no part of the format.)

Payload: all steps (float16), then all codes. A block of w values has m = ceil(w b / 8) bytes of
codes; byte j holds the codes j, j + m, j + 2m, ... from its low bits up, so that packing works on
long vectors. Little endian.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from xpeer.wire.dither import uniform

STEP_BYTES: Final = 2

_F16_MAX: Final = 65504.0
_F16_MIN_NORMAL: Final = 2.0**-14


@dataclass(frozen=True, slots=True)
class Blocks:
    """One int codec: bits per value."""

    bits: int

    @property
    def levels(self) -> int:
        """Largest k. The range is symmetric, so that Q(-x) = -Q(x) and zero is exact."""
        return (1 << (self.bits - 1)) - 1

    @property
    def per_byte(self) -> int:
        """Codes in a byte."""
        return 8 // self.bits

    def code_bytes(self, width: int) -> int:
        """Bytes of codes in a block of `width` values."""
        return -(-width * self.bits // 8)


def quantise(
    ints: Blocks,
    values: torch.Tensor,  # (rows, width) float32
    dither: torch.Tensor | None,  # (rows,) int32, see `dither.keys`; None = to nearest
    steps: torch.Tensor,  # (rows,) float16, written; infinite where values are not finite
    codes: torch.Tensor,  # (rows, m) int8 for 8 bits, else uint8; written
) -> None:
    """Encode rows.

    A step is rounded *up* to float16, so that no code needs clamping and the error stays within
    half a step, among the subnormals too. The one exception is int2 to nearest: its levels are zero
    and half of the block's largest value, which is near the least square error for bell-shaped
    blocks (Max 1960, three levels: 1.22 sigma; the largest of 128 is about 2.7 sigma), and keeps
    |x - Q(x)| <= |x|, which is what error feedback asks. Stochastic rounding must not clip, or it
    is biased: there the level is the largest value itself.
    """
    clips = ints.bits == 2 and dither is None
    largest = values.abs().amax(1)
    step = _round_up_to_f16(largest * 0.5 if clips else largest / ints.levels)
    rounded = _round(values, step, dither)
    pack(ints, rounded.clamp(-1.0, 1.0) if clips else rounded, codes)
    steps.copy_(step)


def dequantise(
    ints: Blocks,
    steps: torch.Tensor,  # (rows,) float32, finite, not negative
    codes: torch.Tensor,  # (rows, m) as for `quantise`
    out: torch.Tensor,  # (rows, width) float32, written
) -> None:
    """Decode rows."""
    out.copy_(unpack(ints, codes) * steps.unsqueeze(1))


def subtract(
    ints: Blocks,
    own_steps: torch.Tensor,
    own_codes: torch.Tensor,
    steps: torch.Tensor,
    codes: torch.Tensor,
    out: torch.Tensor,  # (rows, width) float32, written: z
    squares: torch.Tensor,  # (rows,) float32, written: |z|^2
    own_squares: torch.Tensor,  # (rows,) float32, written: |Q(own)|^2
) -> None:
    """Rows of z = Q(peer) - Q(own), from both payloads."""
    own = unpack(ints, own_codes) * own_steps.unsqueeze(1)
    subtract_values(ints, own, steps, codes, out, squares, own_squares)


def subtract_values(
    ints: Blocks,
    own: torch.Tensor,  # (rows, width) float32: Q(own)
    steps: torch.Tensor,
    codes: torch.Tensor,
    out: torch.Tensor,
    squares: torch.Tensor,
    own_squares: torch.Tensor,
) -> None:
    """Rows of z, from Q(own) as values."""
    z = unpack(ints, codes) * steps.unsqueeze(1) - own
    squares.copy_((z * z).sum(1))
    own_squares.copy_((own * own).sum(1))
    out.copy_(z)


def _round_up_to_f16(exact: torch.Tensor) -> torch.Tensor:
    """The smallest float16 that is at least `exact`, as float32; infinity for NaN or above all.

    It works on integers, since compilers drop a conversion to float16 and back.
    """
    normal = ((exact.view(torch.int32) + 0x1FFF) & -0x2000).view(torch.float32)
    subnormal = torch.ceil(exact * 2.0**24) * 2.0**-24
    rounded = torch.where(exact < _F16_MIN_NORMAL, subnormal, normal)
    return torch.where(exact <= _F16_MAX, rounded, torch.inf)


def _round(values: torch.Tensor, step: torch.Tensor, dither: torch.Tensor | None) -> torch.Tensor:
    """Values divided by their row's step and rounded: (rows, width) float32 integers."""
    scaled = values / torch.where(step == 0, 1.0, step).unsqueeze(1)
    if dither is None:
        return scaled.round()
    # floor(x + u) in two parts, so that a large x leaves room for the bits of u
    low = scaled.floor()
    return low + ((scaled - low) + uniform(values.shape[1], dither)).floor()


def pack(ints: Blocks, rounded: torch.Tensor, codes: torch.Tensor) -> None:
    """Pack the low b bits of (rows, width) float32 integers into (rows, m) codes."""
    if ints.bits == 8:
        codes.copy_(rounded.to(torch.int8))
        return
    planes = (rounded.to(torch.int32) & ((1 << ints.bits) - 1)).view(
        rounded.shape[0], ints.per_byte, -1
    )
    packed = planes[:, 0]
    for i in range(1, ints.per_byte):
        packed = packed | (planes[:, i] << (i * ints.bits))
    codes.copy_(packed.to(torch.uint8))


def unpack(ints: Blocks, codes: torch.Tensor) -> torch.Tensor:
    """The integers of the codes, (rows, width) float32, with their signs."""
    if ints.bits == 8:
        return codes.to(torch.float32)
    mask, half = (1 << ints.bits) - 1, 1 << (ints.bits - 1)
    whole = codes.to(torch.int32).unsqueeze(1)
    shifts = torch.arange(ints.per_byte, dtype=torch.int32, device=codes.device) * ints.bits
    planes = (whole >> shifts.view(1, -1, 1)) & mask
    return ((planes ^ half) - half).to(torch.float32).view(codes.shape[0], -1)
