"""What a peer shows in mid-run: its parameters averaged with those that partners showed last.

    theta_i[f]  ->  (theta_i[f] + sum of the last m values received of f) / (1 + m),   m <= 2

Between closing windows peers differ; their mean is better than any of them. An average over a few
partners is nearly as good and costs no traffic, since every exchange brings a partner's values
anyway (of a masked group: the mean of the others); that they are some steps old matters little
(docs/benchmarks.md, `convergence`). A moving average of one's own parameters doesn't help.

Kept as they came, compressed: with int8 2 bytes for each parameter. Received values were stamped as
private by their sender, and averages of them stay so.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Final

import torch

from xpeer.forms import Form
from xpeer.mixing.buffers import Buffers
from xpeer.mixing.fragments import Fragments, padded
from xpeer.wire import codec

PARTNERS: Final = 2
"""m: more were hardly better in our measurements."""
_KEPT: Final = "int8"


@dataclass(slots=True)
class ReceivedFragment:
    """A partner's values of one fragment, as it showed them."""

    form: Form
    payload: torch.Tensor  # (bytes,) uint8
    lent: bool = False
    """Another thread may be reading it."""


def shown(form: Form, payload: codec.Payload, vector: slice, buffers: Buffers) -> ReceivedFragment:
    """Keep a verified payload, or what it holds of the parameters as int8.

    Args:
        form: of the payload.
        payload: as received; copied.
        vector: which of its values are parameters.
        buffers: where memory is taken.
    """
    if vector == slice(0, form.num_values):
        kept = buffers.take(memoryview(payload).nbytes, torch.uint8)
        codec.view(kept)[:] = memoryview(payload).cast("B")
        return ReceivedFragment(form, kept)
    return _kept(codec.decode(form, payload)[vector], buffers)


def received_mean(theta: torch.Tensor, z: torch.Tensor, buffers: Buffers) -> ReceivedFragment:
    """Keep what a group's values came to, and no one's own: theta + z, as int8.

    Args:
        theta: (n,) float32: our values.
        z: (n,) float32: what the others' mean, or a combiner's answer, is away from them.
        buffers: where memory is taken.
    """
    return _kept(theta + z, buffers)


def _kept(values: torch.Tensor, buffers: Buffers) -> ReceivedFragment:
    form = Form(_KEPT, values.numel())
    payload = buffers.take(form.num_bytes, torch.uint8)
    codec.encode_into(_KEPT, values, codec.view(payload))
    return ReceivedFragment(form, payload)


class Consolidation:
    """The last values received of every fragment. Used by the training thread alone.

    Args:
        buffers: where memory that is no longer needed goes.
    """

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers
        self._shown: dict[int, deque[ReceivedFragment]] = {}

    def begin(self) -> None:
        """The parameters were set anew."""
        self._shown.clear()

    def merged(self, fragment: int, values: ReceivedFragment) -> None:
        """An exchange of this fragment was merged."""
        kept = self._shown.setdefault(fragment, deque())
        kept.append(values)
        if len(kept) > PARTNERS and not (oldest := kept.popleft()).lent:
            self._buffers.give(oldest.payload)

    def now(self) -> dict[int, tuple[ReceivedFragment, ...]]:
        """A copy that another thread may read."""
        for kept in self._shown.values():
            for values in kept:
                values.lent = True
        return {fragment: tuple(kept) for fragment, kept in self._shown.items()}


def consolidate(
    flat: torch.Tensor, fragments: Fragments, received: dict[int, tuple[ReceivedFragment, ...]]
) -> torch.Tensor:
    """The average.

    Args:
        flat: (num_params,) float32, CPU: our own.
        fragments: how they are cut.
        received: `Consolidation.now`.

    Returns:
        (num_params,) float32.
    """
    out = torch.zeros(padded(flat.numel()))
    out[: flat.numel()] = flat
    for fragment, kept in received.items():
        own = fragments.gather(out, fragment)
        total = sum((codec.decode(s.form, codec.view(s.payload)) for s in kept), own)
        fragments.add_(out, fragment, total.div(1 + len(kept)).sub_(own))
    return out[: flat.numel()]


def packed(flat: torch.Tensor, consolidated: torch.Tensor) -> torch.Tensor:
    """For a checkpoint: what consolidation adds, (bytes,) uint8; a byte for each parameter."""
    out = torch.empty(Form(_KEPT, flat.numel()).num_bytes, dtype=torch.uint8)
    codec.encode_into(_KEPT, consolidated - flat, codec.view(out))
    return out


def unpacked(flat: torch.Tensor, addition: torch.Tensor) -> torch.Tensor:
    """The consolidated parameters again, (num_params,) float32.

    Raises:
        PeerError: `addition` is not what `packed` makes of this many parameters.
    """
    return flat + codec.decode(Form(_KEPT, flat.numel()), codec.view(addition))
