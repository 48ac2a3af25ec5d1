"""Meetings in flight, from our snapshot to the merge; the trainer's half of `xpeer/round.py`.

A meeting is one fragment's exchange with the other peers of a group: one snapshot, a payload of
each partner, one merge. Only copying a fragment out of the model and adding a correction to it
happen on the training thread, at step boundaries. Compressing, decoding, verifying and the rule's
arithmetic happen on a helper thread meanwhile.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import torch

from xpeer.errors import LocalError, PeerError, Reason, TrainerError
from xpeer.training.fragments import Fragments
from xpeer.training.mixing import Difference, NormLimit, difference
from xpeer.training.parts import Mechanism, Parameters
from xpeer.training.rules import Rule
from xpeer.training.rules.base import Correction
from xpeer.update import CompressedUpdate, PrivateUpdate, RawUpdate
from xpeer.wire import codec as wire_codec

MAX_IN_FLIGHT: Final = 16
"""Each holds one fragment in float32, and one more for each partner."""
MAX_GROUP: Final = 64
_COARSE: Final = frozenset({"int4", "int2"})
_SMOOTHING: Final = 0.9
"""Of the consensus distance, per exchange."""


@dataclass(slots=True)
class _Meeting:
    fragment: int
    step: int
    rule: Rule
    theta: torch.Tensor  # (n,) float32: the snapshot
    own: torch.Tensor | None = None  # (V, n) float32: Q of what was sent
    differences: dict[int, Difference] = field(default_factory=dict)
    correction: Correction | None = None
    merged: tuple[int, ...] = ()


class Exchanges:
    """What is in flight, and what came of it.

    Thread-safe: the training thread calls `take` and `merge`, a helper the others.

    Args:
        parameters: of the model.
        fragments: how they are cut.
        codec: of the manifest.
        mechanism: certifies snapshots.
        rule: of the manifest; while no steps are taken, and where a partner takes none, plain
            averaging of the parameters takes its place.

    Attributes:
        seconds_snapshot: of the training thread, in `take`.
        seconds_merge: of the training thread, in `merge`.
        seconds_blocked: of both, waiting for a helper to let go of the lock.
    """

    def __init__(
        self,
        parameters: Parameters,
        fragments: Fragments,
        codec: str,
        mechanism: Mechanism,
        rule: Rule,
    ) -> None:
        self.fragments = fragments
        self.codec = codec
        self.rule = rule
        self.merges = 0
        self.merges_clipped = 0
        self.consensus_distance: float | None = None
        self.seconds_snapshot = self.seconds_merge = self.seconds_blocked = 0.0
        self._steps_late = 0
        self._parameters = parameters
        self._mechanism = mechanism
        self._averaging = Rule()
        self._limits = {
            each: [
                NormLimit(of_differences=vector != each.parameters_at)
                for vector in range(each.vectors)
            ]
            for each in (rule, self._averaging)
        }
        self._in_flight: dict[int, _Meeting] = {}
        self._lock = threading.Lock()

    def begin(self) -> None:
        """The parameters were set anew: what is in flight refers to others."""
        with self._lock:
            self._in_flight.clear()
        for fragment in range(self.fragments.num_fragments):
            self.rule.begin(fragment, self._gather(fragment))

    @property
    def steps_late(self) -> float:
        """Mean steps between snapshot and merge."""
        return self._steps_late / self.merges if self.merges else 0.0

    def take(
        self, meeting_id: int, fragment: int, step: int, *, averaging: bool = False
    ) -> PrivateUpdate:
        """At a step boundary: copy the fragment and have it certified.

        Args:
            meeting_id: of the caller's choice.
            fragment: f.
            step: now.
            averaging: plain averaging of the parameters instead of the manifest's rule.

        Raises:
            PeerError: too many are in flight, or this fragment is (BUSY).
            TrainerError: the id is in use.
            LocalError: no such fragment.
        """
        began = time.perf_counter()
        self.fragments.size(fragment)
        rule = self._averaging if averaging else self.rule
        with self._waiting():
            if meeting_id in self._in_flight:
                raise TrainerError(f"meeting {meeting_id} has its snapshot already")
            if len(self._in_flight) >= MAX_IN_FLIGHT:
                raise PeerError(Reason.BUSY, f"{MAX_IN_FLIGHT} meetings are in flight")
            if any(other.fragment == fragment for other in self._in_flight.values()):
                raise PeerError(Reason.BUSY, f"fragment {fragment} is in flight")
        theta = self._gather(fragment)
        private = self._mechanism.stamp(RawUpdate(rule.outgoing(fragment, theta), step))
        with self._waiting():
            self._in_flight[meeting_id] = _Meeting(fragment, step, rule, theta)
        self.seconds_snapshot += time.perf_counter() - began
        return private

    def compress(self, meeting_id: int, update: PrivateUpdate) -> CompressedUpdate:
        """Off the training thread: compress, and keep what the partners will decode.

        Raises:
            PeerError: dropped meanwhile (CLOSED).
            TrainerError: the parameters can't be encoded.
        """
        try:
            compressed = wire_codec.compress(update, self.codec, dither=self._dither())
        except LocalError as e:
            self.drop(meeting_id)
            raise TrainerError(e.problem, e.remedy) from e
        own = wire_codec.decode(self.codec, compressed.payload, compressed.num_values)
        with self._lock:
            meeting = self._get(meeting_id)
            meeting.own = own.view(meeting.rule.vectors, -1)
        return compressed

    def verify(
        self, meeting_id: int, exchange_id: int, codec: str, payload: memoryview, num_values: int
    ) -> float:
        """Off the training thread: decode and check one partner's payload.

        Returns:
            Relative distance of the two snapshots.

        Raises:
            PeerError: not this codec or size, not finite, too many partners (BUSY), or dropped
                meanwhile (CLOSED).
        """
        with self._lock:
            meeting = self._get(meeting_id)
            own, crowded = meeting.own, len(meeting.differences) >= MAX_GROUP
        if own is None or exchange_id in meeting.differences:
            raise TrainerError(f"meeting {meeting_id} has no snapshot, or knows {exchange_id}")
        if crowded:
            raise PeerError(Reason.BUSY, f"{MAX_GROUP} partners in one meeting")
        if num_values != own.numel():
            raise PeerError(Reason.WRONG_MODEL, f"{num_values} values, {own.numel()} expected")
        if codec != self.codec:
            raise PeerError(Reason.WRONG_CODEC, "the payload is not of the manifest's codec")
        rule = meeting.rule
        found = difference(codec, own, payload, self._limits[rule], rule.parameters_at)
        with self._lock:
            meeting.differences[exchange_id] = found
            before = self.consensus_distance
            self.consensus_distance = (
                found.distance
                if before is None
                else _SMOOTHING * before + (1 - _SMOOTHING) * found.distance
            )
        return found.distance

    def resolve(self, meeting_id: int, weights: Mapping[int, float]) -> None:
        """Off the training thread: what the partners that accepted ask of our parameters.

        Args:
            meeting_id: of the snapshot.
            weights: w_j of every exchange that both sides accepted.

        Raises:
            PeerError: unknown or dropped (CLOSED).
            TrainerError: an exchange was not verified.
        """
        with self._lock:
            meeting = self._get(meeting_id)
        if meeting.own is None or not weights or not meeting.differences.keys() >= weights.keys():
            raise TrainerError(f"meeting {meeting_id}: not all of {list(weights)} were verified")
        first, *others = weights.items()
        shift = meeting.differences[first[0]].values.mul_(first[1])
        for exchange_id, weight in others:
            shift.add_(meeting.differences[exchange_id].values, alpha=weight)
        meeting.merged = tuple(weights)
        meeting.correction = meeting.rule.correct(
            meeting.fragment, meeting.theta, meeting.own, shift
        )

    def merge(self, meeting_id: int, step: int) -> int:
        """At a step boundary: add the correction. How many of the partners' differences were
        clipped; -1 = the meeting was dropped.
        """
        began = time.perf_counter()
        with self._waiting():
            meeting = self._in_flight.pop(meeting_id, None)
        if meeting is None or meeting.correction is None:
            return -1
        correction, rule = meeting.correction, meeting.rule
        flat = self._parameters.flat
        self.fragments.add_(flat, meeting.fragment, correction.values.to(flat.device))
        if rule is self.rule:
            rule.merged(meeting.fragment, correction.state)
        else:
            self.rule.moved(meeting.fragment, correction.values)
        merged = [meeting.differences[exchange_id] for exchange_id in meeting.merged]
        for found in merged:
            for limit, norm in zip(self._limits[rule], found.norms, strict=True):
                limit.accepted(norm)
        clipped = sum(found.clipped for found in merged)
        self.merges += 1
        self.merges_clipped += clipped
        self._steps_late += step - meeting.step
        self.seconds_merge += time.perf_counter() - began
        return clipped

    def drop(self, meeting_id: int) -> None:
        """Forget a meeting; harmless if it is unknown."""
        with self._lock:
            self._in_flight.pop(meeting_id, None)

    def __len__(self) -> int:
        """Number in flight."""
        return len(self._in_flight)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """The lock, on the training thread: how long it was waited for is time blocked."""
        began = time.perf_counter()
        with self._lock:
            self.seconds_blocked += time.perf_counter() - began
            yield

    def _dither(self) -> int | None:
        """Coarse codecs round stochastically: to nearest, what is small would stand still."""
        return secrets.randbits(63) if self.codec in _COARSE else None

    def _gather(self, fragment: int) -> torch.Tensor:
        return self.fragments.gather(self._parameters.flat, fragment).cpu()

    def _get(self, meeting_id: int) -> _Meeting:
        try:
            return self._in_flight[meeting_id]
        except KeyError:
            raise PeerError(Reason.CLOSED, f"meeting {meeting_id} was dropped") from None
