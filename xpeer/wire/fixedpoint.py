"""Fixed-point payloads of masked groups: they can be added up without being read.

A value x becomes the integer q with E[q] = x / step, rounded stochastically to a grid that is the
same at every peer. The low b bits of q travel. Integers mod 2^b may be added, masked and unmasked
in any order. From the sum S over k members and its own q, each member computes

    D = S - k q_own  (mod 2^b, in the range from -2^(b-1) up)   =  sum_j (q_j - q_own)

This holds as long as the right-hand side lies in that range, however large the values themselves
are (the idea of Moniqua, Lu and De Sa 2020, arXiv 2002.11787, for sums). With 32 bits it always
does, since the encoder refuses |q| >= 2^27 and a group has 8 members at most. With 16 bits the
difference may grow too large. So every block of 128 values has a check: sum(w q) mod 2^32 over all
bits of q, not only the low ones. Checks add up and are masked like the rest, and reveal no more of
a sum than the sum itself. The decoded D has to fit them, else the whole payload is refused.

Payload: all codes (16 or 32 bits), then, with 16 bits, all checks (32 bits each). Little endian.

What it does not give: secrecy (see `gossip.masks`), or privacy: rounding is no privacy noise.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from xpeer.errors import PeerError, Reason
from xpeer.forms import BLOCK, Form, diverged, num_blocks
from xpeer.manifest.round import Round
from xpeer.update import CompressedUpdate, PrivateUpdate
from xpeer.wire.splitmix import splitmix64

if TYPE_CHECKING:
    import torch

NAMES: Final = {"masked16": 16, "masked32": 32}
LARGEST: Final = 2.0**27
"""|x / step| has to be smaller."""
MAX_PARTIES: Final = 8
_CHUNK_BLOCKS: Final = 512
"""256 KiB of float32: temporaries stay in the second-level cache."""

Ring = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]
Payload = bytes | bytearray | memoryview
_WEIGHTS: Final = np.array(
    [2 * i + 1 for i in sorted(range(1024), key=splitmix64)[:BLOCK]], dtype=np.uint32
)
"""w of the checks, (BLOCK,): distinct odd integers."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The grid that a swarm rounds values to.

    Args:
        bits: b, 16 or 32.
        step: distance of two neighbours, in parameters' units.
    """

    bits: int
    step: float

    @property
    def codec(self) -> str:
        """The codec's name in forms of its payloads."""
        return f"masked{self.bits}"

    def form(self, num_values: int) -> Form:
        """The form of a payload of this many values."""
        return Form(self.codec, num_values)

    def reach(self, parties: int) -> float:
        """Largest distance of the sum of k members from k times one's own value."""
        span = self.step * 2.0 ** (self.bits - 1)
        return span if self.bits == 16 else min(span, 2 * (parties - 1) * self.step * LARGEST)


def grid_of(rules: Round) -> Grid | None:
    """The manifest's grid; None if its groups exchange without masks."""
    return Grid(rules.mask_bits, rules.mask_step) if rules.masks else None


def rings(form: Form, payload: Payload) -> tuple[Ring, ...]:
    """A payload's codes (mod 2^b) and, with 16 bits, its checks (mod 2^32): views of its memory.

    Raises:
        PeerError: the size is wrong (MALFORMED, OVERSIZE).
    """
    size, expected = memoryview(payload).nbytes, form.num_bytes
    if size != expected:
        reason = Reason.OVERSIZE if size > expected else Reason.MALFORMED
        raise PeerError(reason, f"payload of {size} bytes, {expected} expected")
    if NAMES[form.codec] == 32:
        return (np.frombuffer(payload, dtype="<u4"),)
    codes = np.frombuffer(payload, dtype="<u2", count=form.num_values)
    return codes, np.frombuffer(payload, dtype="<u4", offset=2 * form.num_values)


def add_into(total: tuple[Ring, ...], other: tuple[Ring, ...]) -> None:
    """Add `other` to `total`, each ring by its own modulus."""
    for ours, theirs in zip(total, other, strict=True):
        np.add(ours, theirs, out=ours)


def compress(update: PrivateUpdate, grid: Grid, out: torch.Tensor) -> CompressedUpdate:
    """Round private values to the grid. Anybody can read the result: it has to be masked yet.

    Args:
        update: stamped by the privacy mechanism.
        grid: of the manifest.
        out: (bytes of the form,) uint8, receives the payload.

    Raises:
        TypeError: `update` is not a `PrivateUpdate`.
        LocalError: values are not finite or too large.
    """
    if not isinstance(update, PrivateUpdate):
        raise TypeError("only a PrivateUpdate may be compressed: stamp it first")
    payload = memoryview(out.numpy())  # type: ignore[arg-type]  # an array is a buffer
    encode_into(grid, update.values, payload)
    return CompressedUpdate(payload, grid.form(update.values.numel()), update.step, update.stamp)


def encode_into(
    grid: Grid,
    values: torch.Tensor,  # (n,) float32, CPU
    out: Payload,
    *,
    seed: int | None = None,
) -> None:
    """Round values to the grid and fill a payload with them.

    Args:
        grid: of the manifest.
        values: to be rounded.
        out: writable, of exactly the form's size.
        seed: random seed of the rounding, for tests; None = from the operating system.

    Raises:
        LocalError: values are not finite or too large.
    """
    source = values.detach().numpy()
    codes, *checks = rings(grid.form(len(source)), out)
    # The rounding's seed says nothing of masked values, so it needs no cryptographic generator.
    draw = np.random.Generator(
        np.random.SFC64(secrets.randbits(128) if seed is None else seed)
    ).random
    chunk = _CHUNK_BLOCKS * BLOCK
    scaled, low, dither = (np.empty(min(chunk, len(source)), np.float32) for _ in range(3))
    for start in range(0, len(source), chunk):
        part = source[start : start + chunk]
        x, floor, u = scaled[: len(part)], low[: len(part)], dither[: len(part)]
        np.divide(part, np.float32(grid.step), out=x)
        if not (float(x.min()) > -LARGEST and float(x.max()) < LARGEST):  # NaN fails, too
            raise diverged()
        # floor(x + u) in two parts, so that a large x leaves room for the bits of u
        np.floor(x, out=floor)
        np.subtract(x, floor, out=x)
        draw(out=u, dtype=np.float32)
        np.floor(np.add(x, u, out=x), out=x)
        q = np.add(floor, x, out=x).astype(np.int32).view(np.uint32)
        codes[start : start + chunk] = q.astype(codes.dtype, copy=False)
        if checks:
            first = start // BLOCK
            totals = _check(q)
            checks[0][first : first + len(totals)] = totals


def rounded(grid: Grid, values: torch.Tensor, payload: Payload) -> torch.Tensor:
    """The values that `encode_into` rounded these to: q step, (n,) float32."""
    source = values.detach().numpy()
    codes = rings(grid.form(len(source)), payload)[0]
    low = np.floor(source / np.float32(grid.step)).astype(np.int32)
    up = (codes - low.view(np.uint32).astype(codes.dtype)).astype(np.int32)  # 0 or 1
    import torch  # noqa: PLC0415 - daemons add payloads up, and have none

    return torch.from_numpy((low + up) * np.float32(grid.step)).float()


def difference(
    grid: Grid,
    own: Payload,
    total: Payload,
    parties: int,
    out: torch.Tensor,  # (n,) float32, CPU, written
) -> None:
    """Write z = mean of the others' values - own, on the grid. Undefined after an error.

    Args:
        grid: of the manifest.
        own: our payload, before it was masked.
        total: the sum of all k payloads, ours included, with the masks cancelled.
        parties: k.
        out: z.

    Raises:
        PeerError: the size is wrong; or there is no safe answer (OUT_OF_RANGE), since somebody is
            further away than the grid reaches, the masks did not cancel, or somebody sent garbage.
    """
    z = out.numpy()
    sums, *sum_checks = rings(grid.form(len(z)), total)
    ours, *own_checks = rings(grid.form(len(z)), own)
    signed = np.int16 if grid.bits == 16 else np.int32
    times = ours.dtype.type(parties)
    scale, chunk = np.float32(grid.step / (parties - 1)), _CHUNK_BLOCKS * BLOCK
    for start in range(0, len(z), chunk):
        part = slice(start, start + chunk)
        apart = (sums[part] - ours[part] * times).view(signed)
        if sum_checks:
            blocks = slice(start // BLOCK, start // BLOCK + num_blocks(len(apart)))
            due = sum_checks[0][blocks] - own_checks[0][blocks] * np.uint32(parties)
            if not np.array_equal(_check(apart.astype(np.int32).view(np.uint32)), due):
                raise _out_of_range(grid, parties)
        elif bool((np.abs(apart.astype(np.int64)) > 2 * (parties - 1) * LARGEST).any()):
            raise _out_of_range(grid, parties)
        np.multiply(apart, scale, out=z[part], casting="unsafe")


def _check(q: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """Checks of all blocks, (blocks,): sum(w q) mod 2^32.

    The weights w are distinct and odd. So one or two values that are off by 2^16 are always
    noticed; more at once are missed in one case of 2^12.
    """
    rest = len(q) % BLOCK
    if rest:
        q = np.concatenate((q, np.zeros(BLOCK - rest, np.uint32)))
    return np.asarray((q.reshape(-1, BLOCK) * _WEIGHTS).sum(axis=1, dtype=np.uint32))


def _out_of_range(grid: Grid, parties: int) -> PeerError:
    return PeerError(
        Reason.OUT_OF_RANGE,
        f"the group's sum is further than {grid.reach(parties):g} from {parties} times our values",
    )
