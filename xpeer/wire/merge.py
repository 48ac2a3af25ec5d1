"""How two payloads differ: dequantise, subtract and measure in one pass over memory.

    z = Q(peer) - Q(own)

The norms that a merge checks (||z||, ||Q(own)||) fall out on the way, and so does finiteness: an
int payload whose scales are finite can't decode to anything that is not. Both sides compute z from
the same two payloads, so z here is exactly -z there.

Knows nothing of limits, weights and partners: those are `training.mixing`'s.
"""

from __future__ import annotations

import math
from typing import Final

import torch

from xpeer.errors import PeerError, Reason
from xpeer.wire import kernels
from xpeer.wire import payload as int_payload
from xpeer.wire.blockwise import BLOCK
from xpeer.wire.codec import FLOATS, INTS, Payload, check_flat, decode, encode, raw_payload
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
        out: (num_values,) float32 to write to; after an error undefined with a float codec,
            unchanged with an int codec.

    Returns:
        z, (num_values,) float32, CPU, finite; and the norms.

    Raises:
        PeerError: as `decode`; also a difference that overflows (NOT_FINITE).
        LocalError: an argument that does not fit the codec.
    """
    check_flat(out, num_values)
    z = torch.empty(num_values, dtype=torch.float32) if out is None else out
    theirs = raw_payload(name, peer, num_values)
    if isinstance(own, torch.Tensor):
        check_flat(own, num_values)
        ours = own
    else:
        ours = raw_payload(name, own, num_values)
    if num_values == 0:
        return z, Norms(0.0, 0.0)
    if name in INTS:
        return z, int_payload.difference(INTS[name], ours, theirs, z)
    if ours.dtype == torch.uint8:
        ours = ours.view(FLOATS[name])
    return z, _subtract_floats(ours, theirs.view(FLOATS[name]), z)


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
