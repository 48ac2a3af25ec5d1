"""Blockwise quantisation: the format of the int codecs, and its arithmetic on rows of blocks.

128 values in a row share one float16 step s. A value x becomes the integer k = round(x / s), of
which the low b bits travel. A receiver takes the integer with those low bits that is nearest to
where it expects the value:

    direct (int8, int4, int2)   nearest to 0: the encoder sees to |k| <= 2^(b-1) - 1
    modulo (int8-modulo, ...)   nearest to the receiver's own y / s: right while |x - y| stays
                                within `reach` = (2^(b-1) - 1) s, however large x is;
                                else wrong, but within 2^(b-1) s of y
                                (Moniqua, Lu and De Sa 2020, arXiv 2002.11787: x mod 2^b s)

The functions of this module take (rows, 128) tensors and write into tensors that they are given.
`kernels` compiles the same functions, so compiled and plain code can't differ by design: each
result is one IEEE operation away from its operands, and nothing may be contracted or reordered
except sums of integers. (Sums of squares do depend on the order. They are no part of the format.)

Payload: all steps (float16), with modulo all checks (16 bits), then all codes. A block of w values
has m = ceil(w b / 8) bytes of codes; byte j holds the codes j, j + m, j + 2m, ... from its low bits
up, so that packing works on long vectors. Little endian.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from xpeer.wire.dither import splitmix64, uniform

BLOCK: Final = 128
STEP_BYTES: Final = 2
CHECK_BYTES: Final = 2
INITIAL_SHARE: Final = 0.25
"""Of a block's largest value: the reach of a modulo codec until differences were seen."""

_F16_MAX: Final = 65504.0
_F16_MIN_NORMAL: Final = 2.0**-14
_F16_MIN: Final = 2.0**-24
_MODULO_STEPS: Final = 2.0**17
"""|x / s| at most: float32 still tells apart sixty-fourths of a step."""
_MODULO_CLAMP: Final = 2.0**22
"""|y / s| at most; beyond, float32 can't tell which step is meant, and a value decodes to y."""
_CHECK_TURNS: Final = 64.0
_WEIGHTS: Final = 1024
CHECK_MODULUS: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Blocks:
    """One int codec: bits per value, and whether values are sent modulo 2^b steps."""

    bits: int
    modulo: bool = False

    @property
    def levels(self) -> int:
        """Largest k of a direct code; symmetric, so that Q(-x) = -Q(x) and zero is exact."""
        return (1 << (self.bits - 1)) - 1

    @property
    def turn(self) -> float:
        """2^b: what codes are counted modulo."""
        return float(1 << self.bits)

    @property
    def per_byte(self) -> int:
        """Codes in a byte."""
        return 8 // self.bits

    def code_bytes(self, width: int) -> int:
        """Of a block of `width` values."""
        return -(-width * self.bits // 8)

    def encoded_bytes(self, num_values: int) -> int:
        """Exact payload size."""
        head = STEP_BYTES + (CHECK_BYTES if self.modulo else 0)
        whole, rest = divmod(num_values, BLOCK)
        codes = whole * self.code_bytes(BLOCK) + self.code_bytes(rest)
        return head * num_blocks(num_values) + codes


def num_blocks(num_values: int) -> int:
    """Blocks, the last of which may be short."""
    return -(-num_values // BLOCK)


def quantise(
    form: Blocks,
    values: torch.Tensor,  # (rows, width) float32
    dither: torch.Tensor | None,  # (rows,) int32, see `dither.keys`; None = to nearest
    steps: torch.Tensor,  # (rows,) float16, written; infinite where values are not finite
    codes: torch.Tensor,  # (rows, m) int8 for 8 bits, else uint8; written
) -> None:
    """Encode rows of a direct codec.

    A step is rounded *up* to float16, so that no code needs clamping and the error stays within
    half a step, among the subnormals too. The one exception is int2 to nearest: its levels are zero
    and half of the block's largest value, which is near the least square error for bell-shaped
    blocks (Max 1960, three levels: 1.22 sigma; the largest of 128 is about 2.7 sigma), and keeps
    |x - Q(x)| <= |x|, which is what error feedback asks. Stochastic rounding must not clip, or it
    is biased: there the level is the largest value itself.
    """
    clips = form.bits == 2 and dither is None
    largest = values.abs().amax(1)
    step = _round_up_to_f16(largest * 0.5 if clips else largest / form.levels)
    rounded = _round(values, step, dither)
    pack(form, rounded.clamp(-1.0, 1.0) if clips else rounded, codes)
    steps.copy_(step)


def quantise_modulo(
    form: Blocks,
    values: torch.Tensor,  # (rows, width) float32
    reach: torch.Tensor | None,  # (rows,) float32, not negative; None = `INITIAL_SHARE`
    dither: torch.Tensor | None,
    weights: torch.Tensor,  # see `check_weights`
    steps: torch.Tensor,
    totals: torch.Tensor,  # (rows,) float32, written: the checks, not yet mod 2^16
    codes: torch.Tensor,
) -> None:
    """Encode rows of a modulo codec."""
    largest = values.abs().amax(1)
    wanted = largest * INITIAL_SHARE if reach is None else reach
    least = (largest * (1 / _MODULO_STEPS)).clamp_min(_F16_MIN)
    step = _round_up_to_f16(torch.maximum(wanted / form.levels, least))
    rounded = _round(values, step, dither)
    turns = ((rounded + (form.levels + 1)) * (1 / form.turn)).floor()
    pack(form, rounded - turns * form.turn, codes)
    totals.copy_(_total(turns, weights))
    steps.copy_(step)


def dequantise(
    form: Blocks,
    steps: torch.Tensor,  # (rows,) float32, finite, not negative
    codes: torch.Tensor,  # (rows, m) as for `quantise`
    out: torch.Tensor,  # (rows, width) float32, written
) -> None:
    """Decode rows of a direct codec."""
    out.copy_(unpack(form, codes) * steps.unsqueeze(1))


def dequantise_modulo(
    form: Blocks,
    steps: torch.Tensor,  # (rows,) float32, finite, positive
    codes: torch.Tensor,
    checks: torch.Tensor,  # (rows,) float32: integers mod 2^16
    weights: torch.Tensor,
    near: torch.Tensor,  # (rows, width) float32, finite
    out: torch.Tensor,  # (rows, width) float32, written
) -> None:
    """Decode rows of a modulo codec. A block whose check fails becomes `near`."""
    values, right = _decode_near(form, steps, codes, checks, weights, near)
    out.copy_(torch.where(right.unsqueeze(1), values, near))


def subtract(
    form: Blocks,
    own_steps: torch.Tensor,
    own_codes: torch.Tensor,
    steps: torch.Tensor,
    codes: torch.Tensor,
    weight: torch.Tensor | None,  # () float32
    out: torch.Tensor,  # (rows, width) float32: z is written, or with a weight w z added
    squares: torch.Tensor,  # (rows,) float32, written: |z|^2
    own_squares: torch.Tensor,  # (rows,) float32, written: |Q(own)|^2
) -> None:
    """Rows of z = Q(peer) - Q(own) of a direct codec, from both payloads."""
    own = unpack(form, own_codes) * own_steps.unsqueeze(1)
    subtract_values(form, own, steps, codes, weight, out, squares, own_squares)


def subtract_values(
    form: Blocks,
    own: torch.Tensor,  # (rows, width) float32: Q(own)
    steps: torch.Tensor,
    codes: torch.Tensor,
    weight: torch.Tensor | None,
    out: torch.Tensor,
    squares: torch.Tensor,
    own_squares: torch.Tensor,
) -> None:
    """Rows of z of a direct codec, from Q(own) as values."""
    z = unpack(form, codes) * steps.unsqueeze(1) - own
    squares.copy_((z * z).sum(1))
    own_squares.copy_((own * own).sum(1))
    _deliver(z, weight, out)


def subtract_modulo(
    form: Blocks,
    own: torch.Tensor,  # (rows, width) float32: Q(own)
    steps: torch.Tensor,
    codes: torch.Tensor,
    checks: torch.Tensor,
    weights: torch.Tensor,
    weight: torch.Tensor | None,
    out: torch.Tensor,
    squares: torch.Tensor,
    own_squares: torch.Tensor,
    largest: torch.Tensor,  # (rows,) float32, written: max |z|; -1 where the check fails
) -> None:
    """Rows of z of a modulo codec, decoded near Q(own); zero where the check fails."""
    values, right = _decode_near(form, steps, codes, checks, weights, own)
    z = values - own
    largest.copy_(torch.where(right, z.abs().amax(1), -1.0))
    squares.copy_(torch.where(right, (z * z).sum(1), 0.0))
    own_squares.copy_((own * own).sum(1))
    _deliver(torch.where(right.unsqueeze(1), z, 0.0), weight, out)


def check_weights(width: int) -> torch.Tensor:
    """(1, width) float32, distinct odd integers: a check is sum(weight * (turns mod 64)) mod 2^16.

    A single value that is off by any number of turns but a multiple of 64 is always noticed, two
    that are off by one turn each are, too;
    more at once escape by chance, about once in 2^12 blocks.
    """
    by_hash = sorted(range(_WEIGHTS), key=splitmix64)
    return torch.tensor([[2.0 * i + 1.0 for i in by_hash[:width]]])


def _round_up_to_f16(exact: torch.Tensor) -> torch.Tensor:
    """The smallest float16 that is not below, as float32; infinity if there is none, or for NaN.

    In integers, since compilers drop a conversion to float16 and back.
    """
    normal = ((exact.view(torch.int32) + 0x1FFF) & -0x2000).view(torch.float32)
    subnormal = torch.ceil(exact * 2.0**24) * 2.0**-24
    rounded = torch.where(exact < _F16_MIN_NORMAL, subnormal, normal)
    return torch.where(exact <= _F16_MAX, rounded, torch.inf)


def _round(values: torch.Tensor, step: torch.Tensor, dither: torch.Tensor | None) -> torch.Tensor:
    """(rows, width) float32 integers."""
    scaled = values / torch.where(step == 0, 1.0, step).unsqueeze(1)
    if dither is None:
        return scaled.round()
    # floor(x + u) in two parts, so that a large x leaves room for the bits of u
    low = scaled.floor()
    return low + ((scaled - low) + uniform(values.shape[1], dither)).floor()


def pack(form: Blocks, rounded: torch.Tensor, codes: torch.Tensor) -> None:
    """(rows, width) float32 integers to (rows, m) codes: their low b bits."""
    if form.bits == 8:
        codes.copy_(rounded.to(torch.int8))
        return
    planes = (rounded.to(torch.int32) & ((1 << form.bits) - 1)).view(
        rounded.shape[0], form.per_byte, -1
    )
    packed = planes[:, 0]
    for i in range(1, form.per_byte):
        packed = packed | (planes[:, i] << (i * form.bits))
    codes.copy_(packed.to(torch.uint8))


def unpack(form: Blocks, codes: torch.Tensor) -> torch.Tensor:
    """Codes as (rows, width) float32, sign extended."""
    if form.bits == 8:
        return codes.to(torch.float32)
    mask, half = (1 << form.bits) - 1, 1 << (form.bits - 1)
    whole = codes.to(torch.int32).unsqueeze(1)
    shifts = torch.arange(form.per_byte, dtype=torch.int32, device=codes.device) * form.bits
    planes = (whole >> shifts.view(1, -1, 1)) & mask
    return ((planes ^ half) - half).to(torch.float32).view(codes.shape[0], -1)


def _decode_near(
    form: Blocks,
    steps: torch.Tensor,
    codes: torch.Tensor,
    checks: torch.Tensor,
    weights: torch.Tensor,
    near: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, width) float32 values nearest to `near`, and (rows,) whether the checks hold."""
    code = unpack(form, codes)
    expected = near * (1.0 / steps).unsqueeze(1)
    known = expected.abs() <= _MODULO_CLAMP
    expected = torch.where(known, expected, 0.0)
    turns = ((expected - code) * (1 / form.turn)).round()
    values = torch.where(known, (code + turns * form.turn) * steps.unsqueeze(1), near)
    apart = (_total(turns, weights) - checks) * (1 / CHECK_MODULUS)
    return values, apart == apart.round()


def _total(turns: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(rows,) float32. All are integers below 2^24, so the sum is exact in any order."""
    low = turns - (turns * (1 / _CHECK_TURNS)).round() * _CHECK_TURNS
    return (low * weights).sum(1)


def _deliver(z: torch.Tensor, weight: torch.Tensor | None, out: torch.Tensor) -> None:
    if weight is None:
        out.copy_(z)
    else:
        out.add_(z * weight)
