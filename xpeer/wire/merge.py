"""The difference of two payloads: dequantise, subtract and measure in one pass over memory.

    z = Q(peer) - Q(own)

The same pass gives the norms that a merge checks (||z||, ||Q(own)||), and shows that all values are
finite: an int payload with finite scales can't decode to anything else. Both sides compute z from
the same two payloads, so z here is exactly -z there.

This module knows nothing of limits, weights and partners: see `mixing.differences`.
"""

from __future__ import annotations

import math
from typing import Final

import torch

from xpeer.errors import PeerError, Reason
from xpeer.forms import BLOCK, Form
from xpeer.wire import int_payload, kernels
from xpeer.wire.codec import FLOATS, INTS, Payload, check_flat, decode, encode, raw_payload
from xpeer.wire.int_payload import Norms

_CHUNK_VALUES: Final = 1 << 17
"""512 KiB of float32: temporaries stay in the second-level cache."""


def difference(
    form: Form,
    own: Payload | torch.Tensor,
    peer: Payload,
    *,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Norms]:
    """Compute z = Q(peer) - Q(own) and its norms, in one pass.

    Args:
        form: of both payloads, from our own manifest.
        own: our payload as it was sent, or Q(own) as (num_values,) float32.
        peer: the partner's payload as received.
        out: (num_values,) float32, receives z. After an error it is undefined with a float codec,
            and unchanged with an int codec.

    Returns:
        z, (num_values,) float32, CPU, finite; and the norms.

    Raises:
        PeerError: as `decode`; or the difference overflows (NOT_FINITE).
        LocalError: an argument does not fit the codec.
    """
    check_flat(out, form.num_values)
    z = torch.empty(form.num_values, dtype=torch.float32) if out is None else out
    theirs = raw_payload(form, peer)
    if isinstance(own, torch.Tensor):
        check_flat(own, form.num_values)
        ours = own
    else:
        ours = raw_payload(form, own)
    if form.num_values == 0:
        return z, Norms(0.0, 0.0)
    if form.codec in INTS:
        return z, int_payload.difference(INTS[form.codec], ours, theirs, z)
    dtype = FLOATS[form.codec]
    if ours.dtype == torch.uint8:
        ours = ours.view(dtype)
    return z, _subtract_floats(ours, theirs.view(dtype), z)


def prepare(form: Form, *, stochastic: bool = False, decoded: bool = False) -> None:
    """Compile now the kernels that exchanges with this codec will run.

    Otherwise the first large exchange would compile them, and be late. It takes seconds, once per
    process, if kernels are compiled at all.

    Args:
        form: of the largest payloads; for small ones nothing is compiled.
        stochastic: whether payloads will be rounded with a dither.
        decoded: whether `difference` will get Q(own) instead of our payload.
    """
    if form.codec in FLOATS or not (kernels.compiling() and kernels.is_large(form.num_values)):
        return
    large = Form(form.codec, kernels.ROWS * BLOCK)
    payload = encode(form.codec, torch.zeros(large.num_values), dither=0 if stochastic else None)
    own = decode(large, payload)
    difference(large, own if decoded else payload, payload)


def _subtract_floats(own: torch.Tensor, peer: torch.Tensor, out: torch.Tensor) -> Norms:
    """Subtract float payloads. Norms are added up in float64, lest large values overflow."""
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
