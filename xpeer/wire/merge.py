"""From two payloads to a correction: dequantise, subtract, measure and add in one pass over memory.

    z = Q(peer) - Q(own)            parameters += w z

The norms that a merge checks (||z||, ||Q(own)||) fall out on the way, and so does finiteness: an
int payload whose scales are finite can't decode to anything that is not. Both sides compute z from
the same two payloads, so z here is exactly -z there.

Knows nothing of limits, weights and partners: those are `training.mixing`'s.
"""

from __future__ import annotations

import math
from typing import Final

import torch

from xpeer.errors import LocalError, PeerError, Reason
from xpeer.wire import kernels
from xpeer.wire import payload as int_payload
from xpeer.wire.blockwise import BLOCK
from xpeer.wire.codec import (
    FLOATS,
    INTS,
    Payload,
    check_flat,
    decode,
    encode,
    raw_payload,
)
from xpeer.wire.payload import Norms

_CHUNK_VALUES: Final = 1 << 17
"""512 KiB of float32: temporaries stay in the second-level cache."""


def difference(
    name: str,
    own: Payload | torch.Tensor,
    peer: Payload,
    num_values: int,
    *,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Norms]:
    """Get z = Q(peer) - Q(own) and its norms, in one pass.

    Args:
        name: codec.
        own: our payload as it was sent, or Q(own) as (num_values,) float32.
        peer: the partner's payload as received.
        num_values: what our own manifest says.
        out: (num_values,) float32 to write to; undefined after an error.

    Returns:
        z, (num_values,) float32, CPU, finite; and the norms.

    Raises:
        PeerError: as `decode`; also a difference that overflows (NOT_FINITE).
        LocalError: an argument that does not fit the codec.
    """
    check_flat(out, num_values)
    z = torch.empty(num_values, dtype=torch.float32) if out is None else out
    return z, _merge(name, own, peer, z, None)


def add_difference(
    name: str,
    own: Payload | torch.Tensor,
    peer: Payload,
    parameters: torch.Tensor,
    weight: float,
) -> Norms:
    """Add weight * (Q(peer) - Q(own)) to parameters, in one pass.

    Args:
        name: codec.
        own: as for `difference`.
        peer: the partner's payload.
        parameters: (n,) float32, CPU, contiguous; unchanged if the payload is refused.
        weight: w.

    Raises:
        PeerError: as `difference`.
        LocalError: an argument that does not fit the codec, or a weight that is not a number.
    """
    if not math.isfinite(weight):
        raise LocalError(f"mixing weight {weight!r} is not a number")
    check_flat(parameters, parameters.numel())
    if name in INTS:
        return _merge(name, own, peer, parameters, weight)
    z, norms = difference(name, own, peer, parameters.numel())  # may yet turn out not finite
    parameters.add_(z.mul_(weight))
    return norms


def prepare(name: str, num_values: int, *, stochastic: bool = False, decoded: bool = False) -> None:
    """Compile now what exchanges with this codec will run, rather than in the first large one.

    Takes seconds, once per process, if anything is compiled at all: the first exchange would
    otherwise be late by as much.

    Args:
        name: codec.
        num_values: of the largest payloads; small ones are not worth it.
        stochastic: whether payloads will be rounded with a dither.
        decoded: whether `difference` will be given Q(own) instead of our payload.
    """
    if name in FLOATS or not kernels.compiling() or num_values < kernels.ROWS * BLOCK:
        return
    zeros = torch.zeros(kernels.ROWS * BLOCK)
    dither = 0 if stochastic else None
    payload = encode(name, zeros, dither=dither)
    own = decode(name, payload, zeros.numel())
    difference(name, own if decoded else payload, payload, zeros.numel())


def _merge(
    name: str,
    own: Payload | torch.Tensor,
    peer: Payload,
    out: torch.Tensor,
    weight: float | None,
) -> Norms:
    n = out.numel()
    theirs = raw_payload(name, peer, n)
    if isinstance(own, torch.Tensor):
        check_flat(own, n)
        ours = own
    else:
        ours = raw_payload(name, own, n)
    if n == 0:
        return Norms(0.0, 0.0)
    if name in INTS:
        return int_payload.difference(INTS[name], ours, theirs, out, weight)
    if ours.dtype == torch.uint8:
        ours = ours.view(FLOATS[name])
    return _subtract_floats(ours, theirs.view(FLOATS[name]), out)


def _subtract_floats(own: torch.Tensor, peer: torch.Tensor, out: torch.Tensor) -> Norms:
    """Norms are added up in float64, so that large float32 values don't overflow on the way."""
    square = own_square = 0.0
    for start in range(0, out.numel(), _CHUNK_VALUES):
        cut = slice(start, start + _CHUNK_VALUES)
        ours = own[cut].float()
        z = torch.sub(peer[cut].float(), ours, out=out[cut])
        square += float(torch.linalg.vector_norm(z, dtype=torch.float64)) ** 2
        own_square += float(torch.linalg.vector_norm(ours, dtype=torch.float64)) ** 2
    if not math.isfinite(square):
        raise PeerError(Reason.NOT_FINITE, "a value is not finite, or the difference overflows")
    return Norms(math.sqrt(square), math.sqrt(own_square))
