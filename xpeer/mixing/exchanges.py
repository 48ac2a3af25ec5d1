"""Meetings in flight, from our snapshot to the merge; the trainer's half of `xpeer/round.py`.

A meeting exchanges one fragment with the other peers of a group: one snapshot, a payload from each
partner, one merge. The training thread only copies a fragment out of the model and adds a
correction to it, both at step boundaries. Meanwhile the helper thread compresses, decodes, verifies
and does the rule's arithmetic. `in_flight` lists the stages, and says why there is one helper.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final

import torch

from xpeer.errors import LocalError, PeerError, Reason, TrainerError
from xpeer.mixing import group_means
from xpeer.mixing.buffers import Buffers
from xpeer.mixing.combine import Combiner, Mean, Shift
from xpeer.mixing.in_flight import Certified, InFlight, Resolved, Sent, Verified
from xpeer.mixing.misalignment import Misalignment
from xpeer.mixing.parameters import Certifier, Parameters
from xpeer.mixing.payloads import CodecPayloads, MaskedPayloads, Payloads, combined
from xpeer.mixing.received import Consolidation
from xpeer.mixing.rules import Rule
from xpeer.mixing.rules.base import Correction
from xpeer.mixing.screen import FULL_RATE, Movement, NormLimit, RateShare
from xpeer.update import Checked, CompressedUpdate, PeerUpdate, PrivateUpdate, RawUpdate
from xpeer.wire.fixedpoint import Grid

SPARE: Final = 8
"""Buffers kept for the next meetings: snapshots, payloads, differences and received values."""
_SMOOTHING: Final = 0.9
"""Weight of the past in the consensus distance, per exchange."""


class Exchanges:
    """The meetings in flight, and statistics of those that were merged.

    The training thread calls `take` and `merge`. One helper calls `compress`, `verify` and
    `resolve`. Any thread may call `drop`.

    Args:
        parameters: of the model.
        codec: of the manifest.
        mechanism: certifies snapshots.
        rule: of the manifest. Plain averaging of the parameters takes its place while we take no
            steps, and in meetings with a partner that takes none.
        grid: of masked groups, which use no codec and verify one payload, the group's sum. None =
            groups are not masked.
        combiner: of the manifest; None = the mean.
        misalignment: estimates what averaging adapters loses; None = the model has none.

    Attributes:
        misalignment: as given.
        consensus_distance: smoothed distance to verified partners; None until the first one.
        merges: number of corrections that were added.
        merges_clipped: number of clipped differences in them.
        seconds_snapshot: time that the training thread spent in `take`.
        seconds_merge: time that the training thread spent in `merge`.
    """

    def __init__(
        self,
        parameters: Parameters,
        codec: str,
        mechanism: Certifier,
        rule: Rule,
        grid: Grid | None = None,
        combiner: Combiner | None = None,
        misalignment: Misalignment | None = None,
    ) -> None:
        self.fragments = fragments = parameters.fragments
        self.rule = rule
        self.misalignment = misalignment
        self.buffers = Buffers(SPARE)
        self._combiner = combiner or Mean()
        self.payloads: Payloads = (
            CodecPayloads(codec, self.buffers, remember=self._combiner.trusts_each)
            if grid is None
            else MaskedPayloads(grid, self.buffers)
        )
        self.consolidation = Consolidation(self.buffers)
        self.common = group_means.GroupMeans(fragments) if grid is not None else None
        self.consensus_distance: float | None = None
        self.merges = self.merges_clipped = 0
        self.seconds_snapshot = self.seconds_merge = 0.0
        self._steps_late = 0
        self._parameters = parameters
        self._mechanism = mechanism
        self._averaging = Rule()
        self._movement = Movement(fragments.num_fragments)
        self._limits = {
            each: [
                NormLimit(
                    of_differences=vector != each.parameters_at,
                    of_movements=vector == each.movements_at,
                )
                for vector in range(each.vectors)
            ]
            for each in (rule, self._averaging)
        }
        self._in_flight = InFlight()

    def __len__(self) -> int:
        """Number of meetings in flight."""
        return len(self._in_flight)

    @property
    def seconds_blocked(self) -> float:
        """Time that the training thread waited for the helper to let go of the lock."""
        return self._in_flight.seconds_blocked

    @property
    def steps_late(self) -> float:
        """Mean steps between snapshot and merge."""
        return self._steps_late / self.merges if self.merges else 0.0

    # ---- on the training thread ---------------------------------------------------------------

    def begin(self, *, behind: bool = False) -> None:
        """Start again from new parameters, and drop all meetings: they began with the old ones.

        Args:
            behind: whether the parameters may be older than the other members'.
        """
        self._in_flight.clear()
        self.consolidation.begin()
        if self.misalignment is not None:
            self.misalignment.begin()
        if self.common is not None:
            self.common.begin(self._parameters.read())
        for fragment in range(self.fragments.num_fragments):
            theta = self._parameters.gather(fragment, torch.empty(self.fragments.size(fragment)))
            self._movement.begin(fragment, theta)
            self.rule.begin(fragment, theta)
        if behind:
            self._movement.lies_behind()

    def take(
        self,
        meeting_id: int,
        fragment: int,
        step: int,
        *,
        averaging: bool = False,
        rate: RateShare = FULL_RATE,
    ) -> PrivateUpdate:
        """Copy a fragment and have it certified; at a step boundary.

        Args:
            meeting_id: chosen by the caller.
            fragment: f.
            step: number of local steps so far.
            averaging: average the parameters instead of using the manifest's rule.
            rate: what is left of the learning rate.

        Raises:
            PeerError: too many meetings are in flight, or this fragment is (BUSY).
            TrainerError: the id is in use.
            LocalError: no such fragment.
        """
        began = time.perf_counter()
        size = self.fragments.size(fragment)
        rule = self._averaging if averaging else self.rule
        self._in_flight.require_room(meeting_id, fragment)
        theta = self._parameters.gather(fragment, self.buffers.take(size))
        private = self._mechanism.stamp(RawUpdate(rule.outgoing(fragment, theta), step))
        scale = self._movement.scale(fragment, theta, rate)
        self._in_flight.begin(meeting_id, Certified(fragment, step, rule, theta, scale))
        self.seconds_snapshot += time.perf_counter() - began
        return private

    def merge(self, meeting_id: int, step: int) -> int:
        """Add the correction to the parameters; at a step boundary.

        Returns:
            Number of the partners' differences that were clipped; -1 = the meeting was dropped.

        Raises:
            TrainerError: the meeting is not resolved.
        """
        began = time.perf_counter()
        meeting = self._in_flight.end(meeting_id)
        if meeting is None:
            return -1
        correction, snapshot = meeting.correction, meeting.sent.snapshot
        fragment, rule = snapshot.fragment, snapshot.rule
        self._parameters.add_(fragment, correction.values, correction.scale)
        self._movement.merged(fragment, snapshot.theta, correction.values, correction.scale)
        if rule is self.rule:
            rule.merged(fragment, correction.state)
        else:
            self.rule.moved(fragment, correction.values.mul_(correction.scale))
        clipped = self._learn(meeting)
        self.merges += 1
        self.merges_clipped += clipped
        self._steps_late += step - snapshot.step
        self.seconds_merge += time.perf_counter() - began
        return clipped

    def _learn(self, meeting: Resolved) -> int:
        """Record the norms and values of a merged meeting; returns how many were clipped."""
        snapshot = meeting.sent.snapshot
        for each in meeting.accepted:
            if self.common is not None and each.mean is not None:
                self.common.merged(snapshot.fragment, each.mean)
            norms = each.difference.norms
            for limit, norm in zip(self._limits[snapshot.rule], norms, strict=True):
                if each.difference.clipped:
                    limit.clipped(each.partner)
                else:
                    limit.accepted(norm, each.partner)
        for received in meeting.received:
            self.consolidation.merged(snapshot.fragment, received)
        if self.misalignment is not None and meeting.apart is not None:
            self.misalignment.merged(snapshot.fragment, meeting.apart)
        self._give_back(meeting.sent)
        return sum(each.difference.clipped for each in meeting.accepted)

    def _give_back(self, sent: Sent) -> None:
        """Give the memory of a merged meeting back: nobody refers to it any more."""
        differences = (each.difference.values.view(-1) for each in sent.verified.values())
        for spare in (sent.snapshot.theta, sent.payload, *differences):
            self.buffers.give(spare)

    def state(self) -> dict[str, torch.Tensor]:
        """Return tensors for a checkpoint: the rule's state and the masked groups' means."""
        common = self.common.state() if self.common is not None else {}
        return {**self.rule.state(), **common}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state` returned, after the checkpoint's parameters were put back."""
        self._movement.lies_behind()
        self.rule.restore(state)
        if self.common is not None:
            self.common.restore(state)

    # ---- on the helper ------------------------------------------------------------------------

    def prepare(self) -> None:
        """Prepare the codec before the first exchange needs it."""
        count = self.fragments.num_fragments
        self.payloads.prepare(self.rule, max(self.fragments.size(f) for f in range(count)))

    def compress(self, meeting_id: int, update: PrivateUpdate) -> CompressedUpdate:
        """Compress a snapshot, and keep what the partners will decode.

        Raises:
            PeerError: the meeting was dropped meanwhile (CLOSED).
            TrainerError: the parameters can't be encoded, or were encoded before.
        """
        snapshot = self._in_flight.at(meeting_id, Certified)
        try:
            compressed, sent = self.payloads.make(snapshot, update)
        except LocalError as e:
            self.drop(meeting_id)
            raise TrainerError(e.problem, e.remedy) from e
        self._in_flight.advance(meeting_id, snapshot, sent)
        return compressed

    def verify(self, meeting_id: int, exchange_id: int, update: PeerUpdate) -> Checked:
        """Decode and check one partner's payload, or a masked group's sum.

        Returns:
            The relative distance between the two snapshots (for a sum: between the others' mean
            and our snapshot), and whether it is above the limit.

        Raises:
            PeerError: the payload has another codec or size, or is not finite; too many partners
                (BUSY); a sum is too far away (OUT_OF_RANGE); or the meeting was dropped meanwhile
                (CLOSED).
            TrainerError: we have sent nothing yet, or this exchange was verified before.
        """
        sent = self._in_flight.at(meeting_id, Sent)
        sent.require_new(exchange_id)
        given, expected = update.form, sent.form
        if given.num_values != expected.num_values:
            detail = f"{given.num_values} values, {expected.num_values} expected"
            raise PeerError(Reason.WRONG_MODEL, detail)
        if given != expected:
            raise PeerError(Reason.WRONG_CODEC, "the payload is not of the manifest's codec")
        verified = self.payloads.verify(sent, update, self._limits[sent.snapshot.rule])
        self._in_flight.advance(meeting_id, sent, sent.with_verified(exchange_id, verified))
        distance, before = verified.difference.distance, self.consensus_distance
        if before is not None:
            distance = _SMOOTHING * before + (1 - _SMOOTHING) * distance
        self.consensus_distance = distance
        return Checked(verified.difference.distance, verified.difference.clipped)

    def resolve(self, meeting_id: int, weights: Mapping[int, float]) -> None:
        """Compute the correction from the partners that accepted.

        Args:
            meeting_id: as given to `take`.
            weights: w_j of every exchange that both sides accepted.

        Raises:
            PeerError: the meeting is unknown or was dropped (CLOSED), or has too few partners for
                the combiner (GROUP_TOO_SMALL).
            TrainerError: an exchange was not verified.
        """
        sent = self._in_flight.at(meeting_id, Sent)
        if not weights or not sent.verified.keys() >= weights.keys():
            raise TrainerError(f"meeting {meeting_id}: not all of {list(weights)} were verified")
        accepted = tuple(sent.verified[exchange_id] for exchange_id in weights)
        apart = self._apart(sent, accepted[-1])
        differences = [each.difference.values for each in accepted]
        shift = self._combiner.combine(differences, list(weights.values()))
        received = tuple(each.received for each in accepted if each.received is not None)
        if not self._combiner.trusts_each:
            received = (combined(sent, shift.scaled(), self.buffers),)
        correction = _correction(sent, shift)
        resolved = Resolved(sent, correction, accepted, received, apart)
        self._in_flight.advance(meeting_id, sent, resolved)

    def _apart(self, sent: Sent, partner: Verified) -> torch.Tensor | None:
        """Copy the difference to a partner's parameters, before the combiner overwrites it."""
        if self.misalignment is None:
            return None
        at = sent.snapshot.rule.parameters_at
        return self.misalignment.copy(partner.difference.values[at])

    # ---- on any thread ------------------------------------------------------------------------

    def drop(self, meeting_id: int) -> None:
        """Forget a meeting; an unknown one is ignored."""
        self._in_flight.drop(meeting_id)


def _correction(sent: Sent, shift: Shift) -> Correction:
    """Compute the rule's correction; may overwrite the shift."""
    snapshot, rule = sent.snapshot, sent.snapshot.rule
    if rule.is_plain:  # the scale is applied as it is added to the parameters
        return Correction(shift.values[0], scale=shift.scale)
    own = torch.empty(0)
    if rule.reads_own and isinstance(sent.own, torch.Tensor):
        own = sent.own.view(shift.values.shape)
    return rule.correct(snapshot.fragment, snapshot.theta, own, shift.scaled())
