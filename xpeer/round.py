"""One meeting, from start to end: read this file first.

The way of an update from a shard to everybody's checkpoint:

    shard        training/tokenising.py  text -> tokens on disk, cut into records when they are
                                         asked for (record_view.py); they never leave the trainer
    train        privacy/mechanism.py    per record: clip; per batch: noise; charged beforehand
    meet         gossip/clock.py         whom, at each slot; gossip/meetings.py makes a `Meeting`
    snapshot     mixing/exchanges.py     a fragment of the parameters, at a step boundary
    compress     wire/codec.py           accepts a PrivateUpdate and nothing else
    (mask        gossip/masked.py        groups of three and more, where the manifest says so)
    seal         wire/session.py         to this partner, for this session
    exchange     network/agreement.py    ours against theirs, both accept or neither merges
    verify       mixing/exchanges.py     size, finite, norm
    combine      mixing/combine.py       the differences Q(theta_j) - Q(theta_i) become one shift
    merge        mixing/rules/           c(shift) beside the steps, then theta += at a boundary
    checkpoint   training/checkpoint.py  and, for exports, what partners sent: mixing/received.py

`Trainer` below is `trainer/client.py`, in the daemon. What it asks crosses to the trainer's process
(`trainer/child.py`) as a command of `trainer/commands.py`. Some run on the training thread, at a
step boundary: Snapshot, by `training/loop.py`, copies a fragment. Others run on a helper beside the
steps. A merge needs both: Merge computes the correction, and AddCorrection adds it.

Training goes on meanwhile: each `await` below waits for the network or for the trainer's next step
boundary, and the trainer waits for none of them (but see `mixing/rules/gradient.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from xpeer.errors import PeerError, Reason
from xpeer.identity import PeerId
from xpeer.network.agreement import Agreement
from xpeer.policies import Weighting
from xpeer.update import Checked, CompressedUpdate, PeerUpdate
from xpeer.weights import of_pair


class Trainer(Protocol):
    """The trainer process as a meeting sees it."""

    async def snapshot(
        self, meeting_id: int, fragment: int, *, averaging: bool
    ) -> CompressedUpdate:
        """A private, compressed copy of a fragment, as it is at the next step boundary."""

    async def verify(self, meeting_id: int, exchange_id: int, update: PeerUpdate) -> Checked:
        """Check a partner's update and measure how far its values are from ours.

        Raises:
            PeerError: it can't be merged.
        """

    async def merge(self, meeting_id: int, weights: dict[int, float]) -> None:
        """Queue the merge of verified updates for the next step boundary.

        Args:
            meeting_id: of the meeting.
            weights: weight of each exchange to merge, by exchange id.
        """

    def drop(self, meeting_id: int) -> None:
        """Forget this meeting. An unknown one is ignored."""


@dataclass(frozen=True, slots=True)
class Exchanged:
    """Result of one exchange."""

    distance: float
    """||Q(theta_j) - Q(theta_i)|| / ||Q(theta_i)|| on the fragment."""
    clipped: bool = False
    """True iff the partner's difference was above the norm limit, and only part of it merges."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeetingPlan:
    """Arguments of a meeting."""

    meeting_id: int
    """Unique in this node."""
    slot: int
    """Number of the slot by the shared clock."""
    fragment: int
    averaging: bool
    """True iff the parameters are plainly averaged, whatever the manifest's rule."""
    expected: Collection[PeerId]
    """Partners of this meeting. Each exchanges with us once at most."""
    gather_s: float
    """Seconds that every partner has to begin its exchange; later ones are refused."""


class Gathering:
    """The partners of a meeting: which have come, and which we still wait for.

    Args:
        trainer: ours.
        plan: see `MeetingPlan`.

    Attributes:
        accepted: exchanges that both sides accepted: partner -> exchange id.
        closed: True iff no further exchange may begin.
        missing: partners that had not come when the time for it was over; empty until then.
    """

    def __init__(self, trainer: Trainer, plan: MeetingPlan) -> None:
        self.slot, self.fragment = plan.slot, plan.fragment
        self.averaging = plan.averaging
        self._trainer = trainer
        self._id = plan.meeting_id
        self._gather_s = plan.gather_s
        self._waiting = set(plan.expected)
        self.accepted: dict[PeerId, int] = {}
        self._changed = asyncio.Event()
        self.closed = False
        self.missing: frozenset[PeerId] = frozenset()

    def expects(self, peer_id: PeerId) -> bool:
        """Whether we still wait for this partner to begin its exchange."""
        return not self.closed and peer_id in self._waiting

    def give_up(self, peer_id: PeerId) -> None:
        """Wait for this partner no longer: there will be no exchange with it."""
        self._mark_arrived(peer_id)

    def _mark_arrived(self, peer_id: PeerId) -> None:
        self._waiting.discard(peer_id)
        self._changed.set()

    async def _wait_for_partners(self) -> None:
        """Wait until every partner has begun or was given up, `gather_s` at most."""
        try:
            async with asyncio.timeout(self._gather_s):
                await self._until(lambda: not self._waiting)
        except TimeoutError:
            self.missing = frozenset(self._waiting)
            self._waiting.clear()

    async def _until(self, done: Callable[[], bool]) -> None:
        while not done():
            self._changed.clear()
            await self._changed.wait()


class Meeting(Gathering):
    """A fragment's exchanges with the other members of a group: one snapshot, one merge.

    Args:
        trainer: ours.
        plan: see `MeetingPlan`.
        least: number of members, ourselves included, that a merge needs.
    """

    def __init__(self, trainer: Trainer, plan: MeetingPlan, least: int = 2) -> None:
        super().__init__(trainer, plan)
        self._least = least
        self._running: set[PeerId] = set()
        self._weights: dict[int, float] = {}
        self._snapshot: asyncio.Task[CompressedUpdate] | None = None

    async def run(self) -> None:
        """Wait for the group's exchanges, then merge those that were accepted.

        Raises:
            PeerError, LocalError: they could not be merged, or were too few (GROUP_TOO_SMALL).
        """
        try:
            await self._wait_for_partners()
            await self._until(lambda: not self._running)
            self.closed = True
            self._require_enough()
            if self._weights:
                await self._trainer.merge(self._id, self._weights)
            else:
                self._trainer.drop(self._id)
        except BaseException:
            self._trainer.drop(self._id)
            raise
        finally:
            self.closed = True
            if self._snapshot is not None:
                self._snapshot.cancel()

    def _require_enough(self) -> None:
        if 0 < len(self._weights) < self._least - 1:
            came = 1 + len(self._weights)
            self.accepted.clear()  # such a combiner keeps no sum: no merge is one-sided
            raise PeerError(Reason.GROUP_TOO_SMALL, f"{came} of {self._least} came")

    async def exchange(
        self, agreement: Agreement, *, weighting: Weighting, deadline_s: float
    ) -> Exchanged:
        """Exchange the fragment with one partner, after both agreed to.

        Raises:
            PeerError: we will not merge it; `UnresolvedError` if the partner may.
        """
        peer_id, exchange_id = agreement.peer_id, agreement.exchange_id
        self._mark_arrived(peer_id)
        self._running.add(peer_id)
        try:
            async with asyncio.timeout(deadline_s):
                weight = of_pair(weighting, agreement.ours, agreement.theirs)
                update = await self._snapshot_once()
                received = await agreement.swap(update)
                checked = await self._trainer.verify(self._id, exchange_id, received)
                agreement.release(received)
                await agreement.accept_both()
                self.accepted[peer_id], self._weights[exchange_id] = exchange_id, weight
        except TimeoutError as e:
            raise PeerError(Reason.TIMEOUT, f"not accepted within {deadline_s:g} s") from e
        finally:
            self._running.discard(peer_id)
            self._changed.set()
        return Exchanged(checked.distance, checked.clipped)

    async def _snapshot_once(self) -> CompressedUpdate:
        """The snapshot that all partners get; the first caller has it made."""
        if self._snapshot is None:
            self._snapshot = asyncio.create_task(
                self._trainer.snapshot(self._id, self.fragment, averaging=self.averaging)
            )
        return await asyncio.shield(self._snapshot)
