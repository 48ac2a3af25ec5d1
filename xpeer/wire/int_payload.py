"""Payloads of the int codecs: where steps and codes lie, and which contents are valid.

Everything here is on the CPU. The caller has checked sizes against our own manifest's number of
values. Nothing in a payload decides how much is read or allocated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from xpeer.errors import PeerError, Reason
from xpeer.forms import BLOCK, diverged, num_blocks
from xpeer.wire import kernels
from xpeer.wire.blockwise import (
    STEP_BYTES,
    Blocks,
    dequantise,
    quantise,
    subtract,
    subtract_values,
    unpack,
)
from xpeer.wire.dither import keys as dither_keys


@dataclass(frozen=True, slots=True)
class Norms:
    """Norms that `difference` measures on its way, for checks that then need no second pass."""

    norm: float
    """||z||, z = Q(peer) - Q(own)."""
    own_norm: float
    """||Q(own)||."""


class _Parts(NamedTuple):
    """Views of a payload."""

    steps: torch.Tensor  # (blocks,) float16
    codes: torch.Tensor  # (bytes,) int8 for 8 bits, else uint8


class _Run(NamedTuple):
    """Blocks of one width: all whole ones, or the short last one, which is padded with zeros."""

    blocks: slice
    values: slice
    codes: slice
    width: int

    def rows(self, flat: torch.Tensor) -> torch.Tensor:
        """The run's values as (rows, width): a view of whole blocks, or a padded short one."""
        chosen = flat[self.values]
        if self.width == BLOCK and chosen.numel() % BLOCK == 0:
            return chosen.view(-1, BLOCK)
        padded = torch.zeros(1, self.width)
        padded[0, : chosen.numel()] = chosen
        return padded

    def return_to(self, flat: torch.Tensor, rows: torch.Tensor) -> None:
        """Write back what `rows` copied."""
        chosen = flat[self.values]
        if rows.data_ptr() != chosen.data_ptr():
            chosen.copy_(rows.view(-1)[: chosen.numel()])

    def code_rows(self, parts: _Parts) -> torch.Tensor:
        """The run's codes as (rows, m), a view."""
        return parts.codes[self.codes].view(self.blocks.stop - self.blocks.start, -1)


def encode(
    ints: Blocks,
    values: torch.Tensor,  # (n,) float32
    raw: torch.Tensor,  # (bytes,) uint8, written
    *,
    dither: int | None,
) -> None:
    """Fill a payload with values.

    Raises:
        LocalError: values are not finite, or too large.
    """
    parts = _split(ints, raw, values.numel())
    blocks = parts.steps.numel()
    keys = None if dither is None else dither_keys(dither, blocks)
    for run in _runs(ints, values.numel()):
        rows, steps, codes = run.rows(values), parts.steps[run.blocks], run.code_rows(parts)
        key = None if keys is None else keys[run.blocks]
        kernels.run(quantise, ints, rows, key, steps, codes)
    if not bool(torch.isfinite(parts.steps).all()):
        raise diverged()


def decode(
    ints: Blocks,
    raw: torch.Tensor,  # (bytes,) uint8
    num_values: int,
    start: int,
    out: torch.Tensor,  # (n,) float32, written
) -> None:
    """Read n values of a payload, from `start` on. Nothing is written if its blocks are refused.

    Raises:
        PeerError: as `_checked_steps`.
    """
    begin, end = start // BLOCK * BLOCK, min(num_values, num_blocks(start + out.numel()) * BLOCK)
    parts = _blocks_of(ints, _split(ints, raw, num_values), begin, end)
    all_steps = _checked_steps(ints, parts, end - begin)
    values = out if out.numel() == end - begin else torch.empty(end - begin)
    for run in _runs(ints, end - begin):
        rows, steps, codes = run.rows(values), all_steps[run.blocks], run.code_rows(parts)
        kernels.run(dequantise, ints, steps, codes, rows)
        run.return_to(values, rows)
    if values is not out:
        out.copy_(values[start - begin :][: out.numel()])


def difference(
    ints: Blocks,
    own: torch.Tensor,  # (bytes,) uint8: our payload; or (n,) float32: Q(own)
    peer: torch.Tensor,  # (bytes,) uint8
    out: torch.Tensor,  # (n,) float32, written: z
) -> Norms:
    """Z = Q(peer) - Q(own) in one pass. Nothing is written if the payload is refused.

    Raises:
        PeerError: as `_checked_steps`.
    """
    n = out.numel()
    parts = _split(ints, peer, n)
    steps = _checked_steps(ints, parts, n)
    blocks = steps.numel()
    ours = _split(ints, own, n) if own.dtype == torch.uint8 else None
    own_steps = ours.steps.float() if ours is not None else None
    squares, own_squares = torch.empty(blocks), torch.empty(blocks)
    for run in _runs(ints, n):
        rows = run.rows(out)
        theirs = steps[run.blocks], run.code_rows(parts)
        sums = squares[run.blocks], own_squares[run.blocks]
        if ours is not None and own_steps is not None:
            mine = own_steps[run.blocks], run.code_rows(ours)
            kernels.run(subtract, ints, *mine, *theirs, rows, *sums)
        else:
            kernels.run(subtract_values, ints, run.rows(own), *theirs, rows, *sums)
        run.return_to(out, rows)
    return Norms(_root(squares), _root(own_squares))


def _split(ints: Blocks, raw: torch.Tensor, num_values: int) -> _Parts:
    head = num_blocks(num_values) * STEP_BYTES
    return _Parts(
        steps=raw[:head].view(torch.float16),
        codes=raw[head:].view(torch.int8 if ints.bits == 8 else torch.uint8),
    )


def _blocks_of(ints: Blocks, parts: _Parts, begin: int, end: int) -> _Parts:
    """The blocks of these values; `begin` is a whole block's, `end` too, or the payload's end."""
    first, last = begin // BLOCK, num_blocks(end)
    width = ints.code_bytes(BLOCK)
    return _Parts(parts.steps[first:last], parts.codes[first * width : last * width])


def _runs(ints: Blocks, num_values: int) -> list[_Run]:
    whole, rest = divmod(num_values, BLOCK)
    end, cut = whole * BLOCK, whole * ints.code_bytes(BLOCK)
    runs = []
    if whole:
        runs.append(_Run(slice(0, whole), slice(0, end), slice(0, cut), BLOCK))
    if rest:
        m = ints.code_bytes(rest)
        codes = slice(cut, cut + m)
        last = slice(whole, whole + 1)
        runs.append(_Run(last, slice(end, num_values), codes, m * ints.per_byte))
    return runs


def _checked_steps(ints: Blocks, parts: _Parts, num_values: int) -> torch.Tensor:
    """Check a payload, and return its steps as (blocks,) float32.

    With valid steps, every code decodes to a finite value. The steps are copied, so that a sender
    that still writes to the buffer can't change them after the check.

    Raises:
        PeerError: a step is not finite (NOT_FINITE); or it is negative, or there are codes beyond
            the last value (MALFORMED).
    """
    steps = parts.steps.float()
    if not bool(torch.isfinite(steps).all()):
        raise PeerError(Reason.NOT_FINITE, "a scale is not finite")
    if bool((steps < 0).any()):
        raise PeerError(Reason.MALFORMED, "a scale is negative")
    rest = num_values % BLOCK
    if rest and ints.per_byte > 1:
        last = parts.codes[-ints.code_bytes(rest) :].view(1, -1)
        if bool(unpack(ints, last)[:, rest:].any()):
            raise PeerError(Reason.MALFORMED, "there are codes beyond the last value")
    return steps


def _root(squares: torch.Tensor) -> float:
    """The norm from the blocks' sums of squares, which are added up in float64."""
    return float(squares.sum(dtype=torch.float64).sqrt())
