"""How our vectors differ from a partner's; no IO, no clock, no processes.

    z_j = Q(theta_j[f]) - Q(theta_i[f])        shift = sum_j w_j z_j

Both sides of a pair know both quantised snapshots, and z_j here is -z_i there. So what one side
adds, the other subtracts, up to float rounding. This holds whatever the codec drops, however late
either side merges, and whoever else in the group is missing. A clipped z breaks it on one side;
clips are counted. The aggregation rule decides what becomes of the shift (`xpeer/mixing/rules`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from xpeer.forms import Form
from xpeer.mixing.screen import Limit
from xpeer.wire import merge
from xpeer.wire.codec import Payload

_CHUNK_VALUES: Final = 1 << 15


@dataclass(frozen=True, slots=True)
class Difference:
    """How a verified partner's vectors differ from ours."""

    values: torch.Tensor  # (V, n) float32, CPU: z, each vector clipped to its limit
    norms: tuple[float, ...]
    """||z|| of each vector, after clipping."""
    distance: float
    """||z|| / ||Q(theta_i[f])|| of the parameters, before clipping."""
    clipped: bool


def difference(
    form: Form,
    own: Payload | torch.Tensor,
    payload: Payload,
    limits: Sequence[Limit],
    parameters_at: int,
    out: torch.Tensor | None = None,
) -> Difference:
    """Decode a partner's payload and subtract our own values.

    Args:
        form: of both payloads: V n values.
        own: what we sent: the payload itself, if it holds one vector; or the values that the
            partner decoded from it, (num_values,) float32.
        payload: the partner's.
        limits: one for each vector; see `screen`. While a vector of ours is zero, the parameters'
            limit takes the place of its own.
        parameters_at: the vector that holds parameters.
        out: (num_values,) float32 to write z to.

    Raises:
        PeerError: see `codec.decode`; or the difference overflows.
    """
    z, whole = merge.difference(form, own, payload, out=out)
    rows = z.view(len(limits), -1)
    if isinstance(own, torch.Tensor) and len(rows) > 1:
        own_rows = own.view(rows.shape)
        measured = [(_norm(row), _norm(ours)) for row, ours in zip(rows, own_rows, strict=True)]
    else:
        measured = [(whole.norm, whole.own_norm)]
    norms, clipped, distance = [], False, 0.0
    for number, (row, its_own) in enumerate(zip(rows, limits, strict=True)):
        limit, (norm, own_norm) = its_own, measured[number]
        if number == parameters_at:
            distance = norm / own_norm if own_norm > 0 else float(norm > 0)
        if own_norm == 0:  # e.g. we have not moved yet: what parameters may differ by counts
            limit, own_norm = limits[parameters_at], measured[parameters_at][1]
        kept = _kept(limit, own_norm, norm)
        if kept < norm:
            row.mul_(kept / norm)
            norm, clipped = kept, True
        norms.append(norm)
    return Difference(rows, tuple(norms), distance, clipped)


def bounded(z: torch.Tensor, own: torch.Tensor, limit: Limit) -> Difference:
    """Measure and clip, in place, a difference of parameters that was decoded before.

    Args:
        z: (n,) float32.
        own: (n,) float32, our values.
        limit: of ||z||.
    """
    norm, own_norm = _norm(z), _norm(own)
    distance = norm / own_norm if own_norm > 0 else float(norm > 0)
    kept = _kept(limit, own_norm, norm)
    clipped = kept < norm
    if clipped:
        z.mul_(kept / norm)
        norm = kept
    return Difference(z.view(1, -1), (norm,), distance, clipped)


def _kept(limit: Limit, own_norm: float, norm: float) -> float:
    """The norm that z keeps. A fragment of zeros that nobody has trained has no limit but zero, and
    would stay zero for ever: there all passes.
    """
    kept = limit(own_norm, norm)
    return kept if kept > 0 or own_norm > 0 else norm


def _norm(values: torch.Tensor) -> float:
    """||x||, accumulated in float64 so that large float32 values don't overflow on the way.

    It is computed in chunks that stay in the cache, since the whole at once is six times slower.
    """
    squares = (
        float(torch.linalg.vector_norm(chunk, dtype=torch.float64)) ** 2
        for chunk in torch.split(values, _CHUNK_VALUES)
    )
    return math.sqrt(sum(squares))
