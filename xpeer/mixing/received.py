"""Consolidation: averages our parameters with the last ones that partners sent.

    theta_i[f]  ->  (theta_i[f] + sum of the last m values received of f) / (1 + m),   m <= 2

Exports and donations in mid-run hold this average. Peers differ until the run closes, and their
mean is better than any of them. An average over a few partners is nearly as good. It costs no
traffic, since every exchange brings a partner's values anyway (a masked group's exchange brings the
mean of the others). The values are some steps old, which matters little (docs/benchmarks.md,
`convergence`). A moving average of one's own parameters doesn't help.

Values are kept compressed, as they came: with int8, 2 bytes for each parameter. Their senders say
that they are private, which can't be proven. If they are, averages of them are private, too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch

from xpeer.forms import Form
from xpeer.mixing.buffers import Buffers
from xpeer.mixing.fragments import Fragments
from xpeer.wire import codec

PARTNERS: Final = 2
"""m; more were hardly better in our measurements."""
_KEPT: Final = "int8"
_AT_ONCE: Final = 1 << 21
"""Values that are averaged at a time."""


@dataclass(slots=True)
class ReceivedFragment:
    """A partner's values of one fragment, as it sent them."""

    form: Form
    payload: torch.Tensor  # (bytes,) uint8
    lent: bool = False
    """True iff another thread may be reading the payload."""


def received_payload(
    form: Form, payload: codec.Payload, vector: slice, buffers: Buffers
) -> ReceivedFragment:
    """Keep a verified payload; if it holds more than parameters, keep only those, as int8.

    Args:
        form: of the payload.
        payload: as received; copied.
        vector: which of its values are parameters.
        buffers: supplies memory.
    """
    if vector == slice(0, form.num_values):
        kept = buffers.take(memoryview(payload).nbytes, torch.uint8)
        codec.view(kept)[:] = memoryview(payload).cast("B")
        return ReceivedFragment(form, kept)
    return _kept(codec.decode(form, payload)[vector], buffers)


def received_mean(theta: torch.Tensor, z: torch.Tensor, buffers: Buffers) -> ReceivedFragment:
    """Keep a group's combined values, theta + z, as int8, instead of any single member's.

    Args:
        theta: (n,) float32: our values.
        z: (n,) float32: the others' mean, or a combiner's result, minus our values.
        buffers: supplies memory.
    """
    return _kept(theta + z, buffers)


def _kept(values: torch.Tensor, buffers: Buffers) -> ReceivedFragment:
    form = Form(_KEPT, values.numel())
    payload = buffers.take(form.num_bytes, torch.uint8)
    codec.encode_into(_KEPT, values, codec.view(payload))
    return ReceivedFragment(form, payload)


class Consolidation:
    """The values of every fragment that were received last. Only the training thread uses it.

    Args:
        buffers: gets memory back that is no longer needed.
    """

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers
        self._kept: dict[int, deque[ReceivedFragment]] = {}

    def begin(self) -> None:
        """Forget everything: the parameters were replaced."""
        self._kept.clear()

    def merged(self, fragment: int, values: ReceivedFragment) -> None:
        """Remember the values of a fragment that was merged; all but the last two are forgotten."""
        kept = self._kept.setdefault(fragment, deque())
        kept.append(values)
        if len(kept) > PARTNERS and not (oldest := kept.popleft()).lent:
            self._buffers.give(oldest.payload)

    def now(self) -> dict[int, tuple[ReceivedFragment, ...]]:
        """Return the values of each fragment; another thread may read them."""
        for kept in self._kept.values():
            for values in kept:
                values.lent = True
        return {fragment: tuple(kept) for fragment, kept in self._kept.items()}


def consolidate_(
    flat: torch.Tensor, fragments: Fragments, received: dict[int, tuple[ReceivedFragment, ...]]
) -> None:
    """Average our parameters with the received ones, in place, by pieces that stay in the cache.

    Args:
        flat: (num_params padded with zeros to whole lines,) float32, CPU: our own.
        fragments: how they are cut.
        received: what `Consolidation.now` returned.
    """
    for fragment, kept in received.items():
        if kept:
            fragments.change_(flat, fragment, partial(_average, kept), _AT_ONCE)


def packed_addition(
    flat: torch.Tensor, fragments: Fragments, received: dict[int, tuple[ReceivedFragment, ...]]
) -> torch.Tensor:
    """Compress what consolidation adds, for a checkpoint: (bytes,) uint8, a byte a parameter.

    Needs memory for all parameters.

    Args:
        flat: (num_params padded to whole lines,) float32, CPU: our own.
        fragments: how they are cut.
        received: what `Consolidation.now` returned.
    """
    added, out = flat.clone(), _payload(fragments.num_params)
    consolidate_(added, fragments, received)
    added.sub_(flat)
    codec.encode_into(_KEPT, added[: fragments.num_params], codec.view(out))
    return out


def _average(kept: Sequence[ReceivedFragment], start: int, own: torch.Tensor) -> None:
    """Average a piece of our own parameters with the same one of each payload."""
    first, *others = kept
    values = _part(first, start, own)
    for sent in others:
        values.add_(_part(sent, start, own))
    own.lerp_(values.div_(len(kept)), len(kept) / (1 + len(kept)))


def _part(sent: ReceivedFragment, start: int, own: torch.Tensor) -> torch.Tensor:
    values = torch.empty(own.numel())
    codec.decode_part(sent.form, codec.view(sent.payload), start, values)
    return values.view(own.shape)


def _payload(num_values: int) -> torch.Tensor:
    return torch.empty(Form(_KEPT, num_values).num_bytes, dtype=torch.uint8)


def unpacked(flat: torch.Tensor, addition: torch.Tensor) -> torch.Tensor:
    """Compute the consolidated parameters again, (num_params,) float32.

    Raises:
        PeerError: `addition` is no `packed_addition` for this many parameters.
    """
    return codec.decode(Form(_KEPT, flat.numel()), codec.view(addition)).add_(flat)
