"""Exchanges in flight, from our snapshot to the merge; the trainer's half of `xpeer/round.py`.

Only copying a fragment out of the model and adding a correction to it happen on the training
thread, at step boundaries. Compressing, decoding and verifying happen on a helper thread meanwhile.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Final

import torch

from xpeer.errors import LocalError, PeerError, Reason, TrainerError
from xpeer.training.mixing import (
    Correction,
    Fragments,
    NormLimit,
    bounded_weight,
    correction,
    decode_peer,
)
from xpeer.training.parts import Mechanism, Parameters
from xpeer.update import CompressedUpdate, PrivateUpdate, RawUpdate
from xpeer.wire import codec as wire_codec

MAX_IN_FLIGHT: Final = 16
"""Each holds one fragment in float32."""
_SMOOTHING: Final = 0.9
"""Of the consensus distance, per exchange."""


@dataclass(slots=True)
class _InFlight:
    fragment: int
    step: int
    own: torch.Tensor | None = None  # Q(theta_i[f]), until verified
    correction: Correction | None = None


class Exchanges:
    """What is in flight, and what came of it.

    Thread-safe: the training thread calls `take` and `merge`, a helper the others.
    """

    def __init__(
        self, parameters: Parameters, fragments: Fragments, codec: str, mechanism: Mechanism
    ) -> None:
        self.fragments = fragments
        self.codec = codec
        self.merges = 0
        self.merges_clipped = 0
        self.consensus_distance: float | None = None
        self._steps_late = 0
        self._merged_here = 0
        self._parameters = parameters
        self._mechanism = mechanism
        self._norm_limit = NormLimit()
        self._in_flight: dict[int, _InFlight] = {}
        self._lock = threading.Lock()

    @property
    def steps_late(self) -> float:
        """Mean steps between snapshot and merge."""
        return self._steps_late / self._merged_here if self._merged_here else 0.0

    def take(self, exchange_id: int, fragment: int, step: int) -> PrivateUpdate:
        """At a step boundary: copy the fragment and have it certified.

        Raises:
            PeerError: too many are in flight (BUSY).
            TrainerError: the id is in use.
            LocalError: no such fragment.
        """
        indices = self.fragments.indices(fragment)
        with self._lock:
            if exchange_id in self._in_flight:
                raise TrainerError(f"exchange {exchange_id} has its snapshot already")
            if len(self._in_flight) >= MAX_IN_FLIGHT:
                raise PeerError(Reason.BUSY, f"{MAX_IN_FLIGHT} exchanges are in flight")
            self._in_flight[exchange_id] = _InFlight(fragment, step)
        try:
            return self._mechanism.stamp(RawUpdate(self._parameters.gather(indices), step))
        except BaseException:
            self.drop(exchange_id)
            raise

    def compress(self, exchange_id: int, update: PrivateUpdate) -> CompressedUpdate:
        """Off the training thread: compress, and keep what the partner will decode.

        Raises:
            PeerError: dropped meanwhile (CLOSED).
            TrainerError: the parameters can't be encoded.
        """
        try:
            compressed = wire_codec.compress(update, self.codec)
        except LocalError as e:
            self.drop(exchange_id)
            raise TrainerError(e.problem, e.remedy) from e
        own = wire_codec.decode(self.codec, compressed.payload, compressed.num_values)
        with self._lock:
            self._get(exchange_id).own = own
        return compressed

    def verify(self, exchange_id: int, codec: str, payload: memoryview, num_values: int) -> float:
        """Off the training thread: decode and check a partner's payload.

        Returns:
            Relative distance of the two snapshots.

        Raises:
            PeerError: not this codec or size, not finite, or dropped meanwhile (CLOSED).
        """
        with self._lock:
            entry = self._get(exchange_id)
            own = entry.own
        if own is None:
            raise TrainerError(f"exchange {exchange_id} has no snapshot, or was verified before")
        if num_values != own.numel():
            raise PeerError(Reason.WRONG_MODEL, f"{num_values} values, the fragment has {len(own)}")
        peer = decode_peer(codec, payload, self.codec, own.numel())
        corrected = correction(own, peer, self._norm_limit)
        with self._lock:
            entry.correction, entry.own = corrected, None
            before = self.consensus_distance
            self.consensus_distance = (
                corrected.distance
                if before is None
                else _SMOOTHING * before + (1 - _SMOOTHING) * corrected.distance
            )
        return corrected.distance

    def admit(self, exchange_id: int) -> None:
        """Check that a merge can be queued.

        Raises:
            PeerError: unknown or dropped (CLOSED).
            TrainerError: not verified.
        """
        with self._lock:
            if self._get(exchange_id).correction is None:
                raise TrainerError(f"exchange {exchange_id} was not verified")

    def merge(self, exchange_id: int, weight: float, step: int) -> bool:
        """At a step boundary: theta[f] += w z. False if it was dropped meanwhile."""
        weight = bounded_weight(weight)
        with self._lock:
            entry = self._in_flight.pop(exchange_id, None)
        if entry is None or entry.correction is None:
            return False
        indices = self.fragments.indices(entry.fragment)
        self._parameters.add_(indices, entry.correction.values.mul_(weight))
        self._norm_limit.accepted(entry.correction.norm)
        self.merges += 1
        self._merged_here += 1
        self.merges_clipped += entry.correction.clipped
        self._steps_late += step - entry.step
        return True

    def drop(self, exchange_id: int) -> None:
        """Forget an exchange; harmless if it is unknown."""
        with self._lock:
            self._in_flight.pop(exchange_id, None)

    def drop_all(self) -> None:
        """The parameters were replaced: what is in flight refers to others."""
        with self._lock:
            self._in_flight.clear()

    def __len__(self) -> int:
        """Number in flight."""
        return len(self._in_flight)

    def _get(self, exchange_id: int) -> _InFlight:
        try:
            return self._in_flight[exchange_id]
        except KeyError:
            raise PeerError(Reason.CLOSED, f"exchange {exchange_id} was dropped") from None
