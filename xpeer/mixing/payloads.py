"""Makes and verifies the payloads of a meeting: in a codec, or in masked groups.

Runs on the helper thread. Knows nothing of processes, weights and rules' arithmetic.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Final, Protocol

import torch

from xpeer.forms import Form
from xpeer.mixing import group_means
from xpeer.mixing.buffers import Buffers
from xpeer.mixing.differences import difference
from xpeer.mixing.in_flight import Certified, Sent, Verified
from xpeer.mixing.received import ReceivedFragment, received_mean, received_payload
from xpeer.mixing.rules import Rule
from xpeer.mixing.screen import NormLimit
from xpeer.update import CompressedUpdate, PeerUpdate, PrivateUpdate
from xpeer.wire import codec as wire_codec
from xpeer.wire import fixedpoint, merge
from xpeer.wire.fixedpoint import Grid

_STOCHASTIC: Final = frozenset({"int4", "int2"})


class Payloads(Protocol):
    """Makes our payload and verifies partners'."""

    def form(self, num_values: int) -> Form:
        """The form of a payload of this many values."""

    def prepare(self, rule: Rule, most: int) -> None:
        """Do slow preparations; called once, before the first meeting.

        Args:
            rule: of the manifest.
            most: number of values in the largest fragment.
        """

    def make(self, snapshot: Certified, update: PrivateUpdate) -> tuple[CompressedUpdate, Sent]:
        """Compress a snapshot, and keep what partners' payloads are compared with.

        Raises:
            LocalError: the parameters can't be encoded.
        """

    def verify(self, sent: Sent, update: PeerUpdate, limits: Sequence[NormLimit]) -> Verified:
        """Decode and check a payload that has the same form as our own.

        Args:
            sent: our own payload.
            update: the partner's payload, or a group's sum.
            limits: one for each vector.

        Raises:
            PeerError: the payload has another size, is not finite, or can't be decoded.
        """


class CodecPayloads:
    """Each partner sends its own values, in the manifest's codec.

    Args:
        codec: its name.
        buffers: supplies memory.
        remember: whether consolidation gets single partners' values.
    """

    def __init__(self, codec: str, buffers: Buffers, *, remember: bool = True) -> None:
        self._codec = codec
        self._buffers = buffers
        self._remember = remember

    def form(self, num_values: int) -> Form:
        """See `Payloads.form`."""
        return Form(self._codec, num_values)

    def prepare(self, rule: Rule, most: int) -> None:
        """Compile the codec's kernels."""
        merge.prepare(
            self.form(rule.vectors * most),
            stochastic=self._dither() is not None,
            decoded=_decodes_own(rule),
        )

    def make(self, snapshot: Certified, update: PrivateUpdate) -> tuple[CompressedUpdate, Sent]:
        """See `Payloads.make`.

        Our payload is kept, and decoded while it is compared. If the rule or the norms of several
        vectors need our decoded values, those are kept instead.
        """
        form = self.form(update.values.numel())
        payload = self._buffers.take(form.num_bytes, torch.uint8)
        made = wire_codec.compress(update, form.codec, dither=self._dither(), out=payload)
        own = wire_codec.decode(form, made.payload) if _decodes_own(snapshot.rule) else made.payload
        return made, Sent(snapshot, form, payload, own, {})

    def verify(self, sent: Sent, update: PeerUpdate, limits: Sequence[NormLimit]) -> Verified:
        """See `Payloads.verify`."""
        snapshot = sent.snapshot
        compared = difference(
            sent.form,
            sent.own,
            update.payload,
            [limit.of(update.peer_id, snapshot.scale) for limit in limits],
            snapshot.rule.parameters_at,
            out=self._buffers.take(sent.form.num_values),
        )
        received = None
        if self._remember and not compared.clipped:
            received = self._parameters_of(update, snapshot.rule)
        return Verified(update.peer_id, compared, received)

    def _parameters_of(self, update: PeerUpdate, rule: Rule) -> ReceivedFragment:
        each = update.form.num_values // rule.vectors
        vector = slice(each * rule.parameters_at, each * (rule.parameters_at + 1))
        return received_payload(update.form, update.payload, vector, self._buffers)

    def _dither(self) -> int | None:
        """A seed for stochastic rounding; None for codecs that round to nearest.

        With coarse codecs, rounding to nearest would lose a small change every time.
        """
        return secrets.randbits(63) if self._codec in _STOCHASTIC else None


class MaskedPayloads:
    """A group's members send masked payloads, of which only the sum can be read.

    Args:
        grid: of the manifest.
        buffers: supplies memory.
    """

    def __init__(self, grid: Grid, buffers: Buffers) -> None:
        self._grid = grid
        self._buffers = buffers

    def form(self, num_values: int) -> Form:
        """See `Payloads.form`."""
        return self._grid.form(num_values)

    def prepare(self, rule: Rule, most: int) -> None:
        """Do nothing: fixed-point payloads need no preparation."""

    def make(self, snapshot: Certified, update: PrivateUpdate) -> tuple[CompressedUpdate, Sent]:
        """See `Payloads.make`."""
        form = self.form(update.values.numel())
        payload = self._buffers.take(form.num_bytes, torch.uint8)
        made = fixedpoint.compress(update, self._grid, payload)
        return made, Sent(snapshot, form, payload, made.payload, {})

    def verify(self, sent: Sent, update: PeerUpdate, limits: Sequence[NormLimit]) -> Verified:
        """See `Payloads.verify`. A sum is compared with our payload as it was before masking."""
        theta, own = sent.snapshot.theta, wire_codec.view(sent.payload)
        limit = limits[0].of("", sent.snapshot.scale)
        total = group_means.decoded(self._grid, theta, own, update, limit, self._buffers)
        return Verified("", total.difference, total.received, total.mean)


def combined(sent: Sent, shift: torch.Tensor, buffers: Buffers) -> ReceivedFragment:
    """Keep the parameters that a combiner made from several partners' values, for consolidation.

    Args:
        sent: our own payload, in a codec.
        shift: (V, n) float32: the combined values minus what we sent.
        buffers: supplies memory.
    """
    own, at = sent.own, sent.snapshot.rule.parameters_at
    if not isinstance(own, torch.Tensor):
        own = wire_codec.decode(sent.form, own)
    return received_mean(own.view(shift.shape)[at], shift[at], buffers)


def _decodes_own(rule: Rule) -> bool:
    return rule.reads_own or rule.vectors > 1
