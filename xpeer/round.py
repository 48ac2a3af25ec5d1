"""One meeting of a round, start to end: read this file first.

An update on its way from a shard to everybody's checkpoint:

    shard        training/records.py      text -> records; they never leave the trainer
    train        privacy/mechanism.py   per record: clip; per batch: noise; charged beforehand
    snapshot     mixing/exchanges.py  a fragment of the parameters, at a step boundary
    compress     wire/codec.py          takes a PrivateUpdate and nothing else
    (mask        masked_round.py        groups of three and more, where the manifest says so)
    seal         wire/session.py        to this partner, for this session
    exchange     network/agreement.py    ours against theirs, both accept or neither merges
    verify       mixing/exchanges.py  size, finite, norm
    combine      mixing/combine.py    the differences Q(theta_j) - Q(theta_i) become one shift
    merge        mixing/rules/          theta += c(shift), at a step boundary
    checkpoint   training/checkpoint.py and, for exports, what partners showed: consolidation.py

Training goes on meanwhile: each `await` below waits for the network or for the trainer's next step
boundary, and the trainer waits for none of them (but see `mixing/rules/gradient.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol, TypedDict, Unpack

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
        """A private, compressed fragment, taken at the next step boundary."""

    async def verify(self, meeting_id: int, exchange_id: int, update: PeerUpdate) -> Checked:
        """How far the partner's values are from ours. Raises PeerError."""

    async def merge(self, meeting_id: int, weights: dict[int, float]) -> None:
        """Merge what was verified and accepted, at the next step boundary."""

    def drop(self, meeting_id: int) -> None:
        """Forget this meeting; harmless if it is unknown."""


@dataclass(frozen=True, slots=True)
class Exchanged:
    """What came of one exchange."""

    distance: float
    """||Q(theta_j) - Q(theta_i)|| / ||Q(theta_i)|| on the fragment."""
    clipped: bool = False
    """The partner's difference was above the norm limit, and merged in part."""


class Given(TypedDict):
    """What a meeting is told at its start."""

    meeting_id: int
    """Unique in this node."""
    slot: int
    """Of the shared clock."""
    fragment: int
    averaging: bool
    """Plain averaging of the parameters, whatever the manifest's rule."""
    expected: Collection[PeerId]
    """Whom we exchange with, at most once each."""
    gather_s: float
    """How long those are waited for that have not begun; late ones are refused."""


class Gathering:
    """Who of a group has come, and who is still waited for.

    Args:
        trainer: ours.
        given: the rest.

    Attributes:
        accepted: by both sides: partner -> exchange id.
        closed: no further exchange may begin.
    """

    def __init__(self, trainer: Trainer, **given: Unpack[Given]) -> None:
        self.slot, self.fragment = given["slot"], given["fragment"]
        self.averaging = given["averaging"]
        self._trainer = trainer
        self._id = given["meeting_id"]
        self._gather_s = given["gather_s"]
        self._waiting = set(given["expected"])
        self.accepted: dict[PeerId, int] = {}
        self._changed = asyncio.Event()
        self.closed = False

    def expects(self, peer_id: PeerId) -> bool:
        """Whether this partner's exchange is still to come."""
        return not self.closed and peer_id in self._waiting

    def give_up(self, peer_id: PeerId) -> None:
        """There will be no exchange with this one."""
        self._comes(peer_id)

    def _comes(self, peer_id: PeerId) -> None:
        self._waiting.discard(peer_id)
        self._changed.set()

    async def _gathered(self) -> None:
        """All that were expected came or won't come, or the time for that is over."""
        try:
            async with asyncio.timeout(self._gather_s):
                await self._until(lambda: not self._waiting)
        except TimeoutError:
            self._waiting.clear()

    async def _until(self, done: Callable[[], bool]) -> None:
        while not done():
            self._changed.clear()
            await self._changed.wait()


class Meeting(Gathering):
    """A fragment's exchanges with the other peers of a group: one snapshot, one merge.

    Args:
        trainer: ours.
        least: members, ourselves included, without whom nothing is merged.
        given: see `Given`.
    """

    def __init__(self, trainer: Trainer, least: int = 2, **given: Unpack[Given]) -> None:
        super().__init__(trainer, **given)
        self._least = least
        self._running: set[PeerId] = set()
        self._weights: dict[int, float] = {}
        self._snapshot: asyncio.Task[CompressedUpdate] | None = None

    async def run(self) -> None:
        """Wait for the group's exchanges, then merge what was accepted.

        Raises:
            PeerError, LocalError: it could not be merged, or too few accepted (GROUP_TOO_SMALL).
        """
        try:
            await self._gathered()
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
            self.accepted.clear()  # a combiner that needs more keeps no sum: nothing is one-sided
            raise PeerError(Reason.GROUP_TOO_SMALL, f"{came} of {self._least} came")

    async def exchange(
        self, agreement: Agreement, *, weighting: Weighting, deadline_s: float
    ) -> Exchanged:
        """Exchange the fragment with one partner, after both agreed to.

        Raises:
            PeerError: nothing of it will be merged here; `UnresolvedError` if the partner may.
        """
        peer_id, exchange_id = agreement.peer_id, agreement.exchange_id
        self._comes(peer_id)
        self._running.add(peer_id)
        try:
            async with asyncio.timeout(deadline_s):
                weight = of_pair(weighting, agreement.ours, agreement.theirs)
                update = await self._taken()
                received = await agreement.swap(update)
                found = await self._trainer.verify(self._id, exchange_id, received)
                agreement.release(received)
                await agreement.accept_both()
                self.accepted[peer_id], self._weights[exchange_id] = exchange_id, weight
        except TimeoutError as e:
            raise PeerError(Reason.TIMEOUT, f"not accepted within {deadline_s:g} s") from e
        finally:
            self._running.discard(peer_id)
            self._changed.set()
        return Exchanged(found.distance, found.clipped)

    async def _taken(self) -> CompressedUpdate:
        """The one snapshot that all partners get."""
        if self._snapshot is None:
            self._snapshot = asyncio.create_task(
                self._trainer.snapshot(self._id, self.fragment, averaging=self.averaging)
            )
        return await asyncio.shield(self._snapshot)
