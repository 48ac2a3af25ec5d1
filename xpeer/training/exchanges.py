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
from xpeer.training import sums
from xpeer.training.buffers import Buffers
from xpeer.training.consolidation import Consolidation, Shown, shown
from xpeer.training.limits import Movement, NormLimit, Scale
from xpeer.training.mixing import Difference, difference
from xpeer.training.parts import Mechanism, Parameters
from xpeer.training.rules import Rule
from xpeer.training.rules.base import Correction
from xpeer.update import Checked, CompressedUpdate, Form, PeerUpdate, PrivateUpdate, RawUpdate
from xpeer.wire import codec as wire_codec
from xpeer.wire import fixedpoint, merge
from xpeer.wire.fixedpoint import Grid

MAX_IN_FLIGHT: Final = 16
"""Each holds one fragment in float32, and one more for each partner."""
MAX_GROUP: Final = 64
SPARE: Final = 8
"""Buffers that are kept for the next meetings: snapshot, payload, difference and what was shown."""
_STOCHASTIC: Final = frozenset({"int4", "int2"})
_SMOOTHING: Final = 0.9
"""Of the consensus distance, per exchange."""


@dataclass(slots=True)
class _Meeting:
    fragment: int
    step: int
    rule: Rule
    theta: torch.Tensor  # (n,) float32: the snapshot
    scale: Scale  # what honest partners' distances are measured by
    payload: torch.Tensor | None = None  # (bytes,) uint8: what was sent
    own: wire_codec.Payload | torch.Tensor | None = None
    """What was sent, or Q of it, (V n,) float32: see `_own`."""
    differences: dict[int, Difference] = field(default_factory=dict)
    partners: dict[int, str] = field(default_factory=dict)
    shown: dict[int, Shown] = field(default_factory=dict)
    correction: Correction | None = None
    merged: tuple[int, ...] = ()
    mean: torch.Tensor | None = None  # (n,) float32: a masked group's, on the grid


class Exchanges:
    """What is in flight, and what came of it.

    Thread-safe: the training thread calls `take` and `merge`, a helper the others.

    Args:
        parameters: of the model.
        codec: of the manifest.
        mechanism: certifies snapshots.
        rule: of the manifest; while no steps are taken, and where a partner takes none, plain
            averaging of the parameters takes its place.
        grid: of masked groups: then there is no codec, and one payload that is a group's sum.

    Attributes:
        seconds_snapshot: of the training thread, in `take`.
        seconds_merge: of the training thread, in `merge`.
        seconds_blocked: of both, waiting for a helper to let go of the lock.
    """

    def __init__(
        self,
        parameters: Parameters,
        codec: str,
        mechanism: Mechanism,
        rule: Rule,
        grid: Grid | None = None,
    ) -> None:
        self.fragments = fragments = parameters.fragments
        self.grid = grid
        self.codec = codec
        self.rule = rule
        self.buffers = Buffers(SPARE)
        self.consolidation = Consolidation(self.buffers)
        self.common = sums.Common(fragments) if grid is not None else None
        self.merges = 0
        self.merges_clipped = 0
        self.consensus_distance: float | None = None
        self.seconds_snapshot = self.seconds_merge = self.seconds_blocked = 0.0
        self._steps_late = 0
        self._parameters = parameters
        self._mechanism = mechanism
        self._averaging = Rule()
        self._movement = Movement(fragments.num_fragments)
        self._limits = {
            each: [
                NormLimit(of_differences=vector != each.parameters_at)
                for vector in range(each.vectors)
            ]
            for each in (rule, self._averaging)
        }
        self._in_flight: dict[int, _Meeting] = {}
        self._lock = threading.Lock()

    def begin(self, *, behind: bool = False) -> None:
        """The parameters were set anew: what is in flight refers to others.

        Args:
            behind: to a donor's: the others have trained on meanwhile.
        """
        with self._lock:
            self._in_flight.clear()
        self.consolidation.begin()
        if self.common is not None:
            self.common.begin(self._parameters.read())
        for fragment in range(self.fragments.num_fragments):
            theta = self._parameters.gather(fragment, torch.empty(self.fragments.size(fragment)))
            self._movement.begin(fragment, theta)
            self.rule.begin(fragment, theta)
        if behind:
            self._movement.lies_behind()

    def prepare(self) -> None:
        """Off the training thread: have the codec ready before the first exchange needs it."""
        if self.grid is not None:
            return
        each = max(self.fragments.size(f) for f in range(self.fragments.num_fragments))
        merge.prepare(
            Form(self.codec, self.rule.vectors * each),
            stochastic=self._dither() is not None,
            decoded=self._decodes_own(self.rule),
        )

    @property
    def steps_late(self) -> float:
        """Mean steps between snapshot and merge."""
        return self._steps_late / self.merges if self.merges else 0.0

    def take(
        self,
        meeting_id: int,
        fragment: int,
        step: int,
        *,
        averaging: bool = False,
        warmed_up: float = 1.0,
    ) -> PrivateUpdate:
        """At a step boundary: copy the fragment and have it certified.

        Args:
            meeting_id: of the caller's choice.
            fragment: f.
            step: now.
            averaging: plain averaging of the parameters instead of the manifest's rule.
            warmed_up: share of the learning rate that the warm-up allows now.

        Raises:
            PeerError: too many are in flight, or this fragment is (BUSY).
            TrainerError: the id is in use.
            LocalError: no such fragment.
        """
        began = time.perf_counter()
        size = self.fragments.size(fragment)
        rule = self._averaging if averaging else self.rule
        with self._waiting():
            if meeting_id in self._in_flight:
                raise TrainerError(f"meeting {meeting_id} has its snapshot already")
            if len(self._in_flight) >= MAX_IN_FLIGHT:
                raise PeerError(Reason.BUSY, f"{MAX_IN_FLIGHT} meetings are in flight")
            if any(other.fragment == fragment for other in self._in_flight.values()):
                raise PeerError(Reason.BUSY, f"fragment {fragment} is in flight")
        theta = self._parameters.gather(fragment, self.buffers.take(size))
        private = self._mechanism.stamp(RawUpdate(rule.outgoing(fragment, theta), step))
        scale = self._movement.scale(fragment, theta, warmed_up)
        with self._waiting():
            self._in_flight[meeting_id] = _Meeting(fragment, step, rule, theta, scale)
        self.seconds_snapshot += time.perf_counter() - began
        return private

    def compress(self, meeting_id: int, update: PrivateUpdate) -> CompressedUpdate:
        """Off the training thread: compress, and keep what the partners will decode.

        Raises:
            PeerError: dropped meanwhile (CLOSED).
            TrainerError: the parameters can't be encoded.
        """
        with self._lock:
            meeting = self._get(meeting_id)
        form = self._form(update.values.numel())
        payload = self.buffers.take(form.num_bytes, torch.uint8)
        try:
            if self.grid is not None:
                compressed = fixedpoint.compress(update, self.grid, payload)
            else:
                compressed = wire_codec.compress(
                    update, self.codec, dither=self._dither(), out=payload
                )
        except LocalError as e:
            self.drop(meeting_id)
            raise TrainerError(e.problem, e.remedy) from e
        meeting.payload = payload
        meeting.own = self._own(meeting.rule, compressed)
        return compressed

    def verify(self, meeting_id: int, exchange_id: int, update: PeerUpdate) -> Checked:
        """Off the training thread: decode and check one partner's payload, or a masked group's sum.

        Returns:
            Relative distance of the two snapshots; of a sum, between the others' mean and ours.
            And whether it is above the limit.

        Raises:
            PeerError: not this codec or size, not finite, too many partners (BUSY), a sum that is
                too far away (OUT_OF_RANGE), or dropped meanwhile (CLOSED).
        """
        with self._lock:
            meeting = self._get(meeting_id)
            own, crowded = meeting.own, len(meeting.differences) >= MAX_GROUP
        if own is None or exchange_id in meeting.differences:
            raise TrainerError(f"meeting {meeting_id} has no snapshot, or knows {exchange_id}")
        if crowded:
            raise PeerError(Reason.BUSY, f"{MAX_GROUP} partners in one meeting")
        rule, form = meeting.rule, update.form
        expected = self._form(rule.vectors * meeting.theta.numel())
        if form.num_values != expected.num_values:
            detail = f"{form.num_values} values, {expected.num_values} expected"
            raise PeerError(Reason.WRONG_MODEL, detail)
        if form != expected:
            raise PeerError(Reason.WRONG_CODEC, "the payload is not of the manifest's codec")
        if self.grid is not None:
            return self._verify_sum(meeting, exchange_id, update)
        found = difference(
            form,
            own,
            update.payload,
            [limit.of(update.peer_id, meeting.scale) for limit in self._limits[rule]],
            rule.parameters_at,
            out=self.buffers.take(form.num_values),
        )
        values = None if found.clipped else self._shown(rule, update)
        meeting.partners[exchange_id] = update.peer_id
        return self._found(meeting, exchange_id, found, values)

    def _verify_sum(self, meeting: _Meeting, exchange_id: int, total: PeerUpdate) -> Checked:
        if self.grid is None or meeting.payload is None:
            raise TrainerError("a group's sum, and no masks")
        own = wire_codec.view(meeting.payload)
        limit = self._limits[meeting.rule][0].of("", meeting.scale)
        found = sums.decoded(self.grid, meeting.theta, own, total, limit, self.buffers)
        meeting.mean = found.mean
        return self._found(meeting, exchange_id, found.difference, found.shown)

    def _found(
        self, meeting: _Meeting, exchange_id: int, found: Difference, values: Shown | None
    ) -> Checked:
        with self._lock:
            meeting.differences[exchange_id] = found
            if values is not None:
                meeting.shown[exchange_id] = values
            before = self.consensus_distance
            self.consensus_distance = (
                found.distance
                if before is None
                else _SMOOTHING * before + (1 - _SMOOTHING) * found.distance
            )
        return Checked(found.distance, found.clipped)

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
        meeting.merged = tuple(weights)
        if not others and type(meeting.rule) is Rule:  # weighted on its way into the parameters
            found = meeting.differences[first[0]]
            meeting.correction = Correction(found.values[0], scale=first[1])
            return
        shift = meeting.differences[first[0]].values.mul_(first[1])
        for exchange_id, weight in others:
            shift.add_(meeting.differences[exchange_id].values, alpha=weight)
        own = torch.empty(0)
        if meeting.rule.reads_own and isinstance(meeting.own, torch.Tensor):
            own = meeting.own.view(shift.shape)
        meeting.correction = meeting.rule.correct(meeting.fragment, meeting.theta, own, shift)

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
        self._parameters.add_(meeting.fragment, correction.values, correction.scale)
        self._movement.merged(meeting.fragment, meeting.theta, correction.values, correction.scale)
        if rule is self.rule:
            rule.merged(meeting.fragment, correction.state)
        else:
            self.rule.moved(meeting.fragment, correction.values.mul_(correction.scale))
        clipped = self._learn(meeting)
        self.merges += 1
        self.merges_clipped += clipped
        self._steps_late += step - meeting.step
        self.seconds_merge += time.perf_counter() - began
        return clipped

    def _learn(self, meeting: _Meeting) -> int:
        """What a merged meeting tells besides; give its memory back. How many were clipped."""
        if self.common is not None and meeting.mean is not None:
            self.common.merged(meeting.fragment, meeting.mean)
        for exchange_id in meeting.merged:
            if exchange_id in meeting.shown:
                self.consolidation.merged(meeting.fragment, meeting.shown[exchange_id])
        merged = {each: meeting.differences[each] for each in meeting.merged}
        for exchange_id, found in merged.items():
            partner = meeting.partners.get(exchange_id, "")
            for limit, norm in zip(self._limits[meeting.rule], found.norms, strict=True):
                if found.clipped:
                    limit.clipped(partner)
                else:
                    limit.accepted(norm, partner)
        differences = (each.values.view(-1) for each in meeting.differences.values())
        for spare in (meeting.theta, meeting.payload, *differences):
            if spare is not None:
                self.buffers.give(spare)
        return sum(found.clipped for found in merged.values())

    def state(self) -> dict[str, torch.Tensor]:
        """For a checkpoint: the rule's, and what masked groups have in common."""
        common = self.common.state() if self.common is not None else {}
        return {**self.rule.state(), **common}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """What `state` gave, after the parameters were put back: a checkpoint's."""
        self._movement.lies_behind()
        self.rule.restore(state)
        if self.common is not None:
            self.common.restore(state)

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
        return secrets.randbits(63) if self.codec in _STOCHASTIC else None

    def _own(self, rule: Rule, sent: CompressedUpdate) -> wire_codec.Payload | torch.Tensor:
        """The payload, to be decoded on the way when it is compared; or its values, where the rule
        or norms of several vectors need them.
        """
        if self.grid is not None or not self._decodes_own(rule):
            return sent.payload
        return wire_codec.decode(sent.form, sent.payload)

    def _decodes_own(self, rule: Rule) -> bool:
        return rule.reads_own or rule.vectors > 1

    def _form(self, num_values: int) -> Form:
        return Form(self.codec, num_values) if self.grid is None else self.grid.form(num_values)

    def _shown(self, rule: Rule, update: PeerUpdate) -> Shown:
        each = update.form.num_values // rule.vectors
        vector = slice(each * rule.parameters_at, each * (rule.parameters_at + 1))
        return shown(update.form, update.payload, vector, self.buffers)

    def _get(self, meeting_id: int) -> _Meeting:
        try:
            return self._in_flight[meeting_id]
        except KeyError:
            raise PeerError(Reason.CLOSED, f"meeting {meeting_id} was dropped") from None
