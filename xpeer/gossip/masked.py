"""One meeting of a masked group: nobody reveals its own values, and all learn their sum.

Every two members of the group exchange messages over their sealed link, in turns. A turn ends once
all have answered:

    key      a fresh X25519 key                   -> everybody can draw the masks
    lock     digest of the members and their keys -> all see the same group, and the same keys
    commit   digest of our masked payload         -> nobody can choose its payload after seeing ours
    echo     digest of all commitments            -> all received the same ones
    reveal   the masked payloads                  -> each is what was committed to
    accept   the sum was decoded                  -> merge

A group has exactly the manifest's k members. With fewer, colluding members could drop honest ones
until one honest member is left. So if a member is missing or lost, all others lose this slot. The
next slot is another attempt, with fresh keys and with the group that it brings.

Until we reveal our values, we may try again with the same ones. After that we may not, in any
group. With another roster the difference of the two sums would be the values of members in only one
of them. With the same roster others may have merged, and the merged mean would reveal our values.
So values that were revealed without a merge are revealed to nobody until a step has changed them.
The same holds for the values of a checkpoint.

A lie is noticed where it makes a difference: different keys for different members (lock), different
commitments (echo), different payloads (reveal, or a refusal by a member that received another one).
It is not always clear who lied. All agree that the slot is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal, TypeVar

from xpeer.errors import PeerError, Reason
from xpeer.gossip import masks
from xpeer.identity import PeerId
from xpeer.network.agreement import Agreement, UnresolvedError
from xpeer.network.link import RefusedError
from xpeer.policies import Weighting
from xpeer.round import Exchanged, Gathering, MeetingPlan, Trainer
from xpeer.update import Checked, CompressedUpdate, MaskedUpdate, PeerUpdate
from xpeer.wire import fixedpoint
from xpeer.wire.messages import MaskStep

STEP_S: Final = 5.0
"""Time for one turn with one partner."""
BYTES_PER_S: Final = 50e6
"""Speed of masking and hashing a payload. The turn `commit` gets that time on top."""
_SUM: Final = 0
"""Exchange id of the sum. The trainer sees the meeting as one exchange."""
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class MaskedGroup:
    """What all masked groups of this node have in common."""

    me: PeerId
    swarm_id: str
    size: int
    """k, the number of members, ourselves included."""
    deadline_s: float
    """Time for a meeting once its members have come."""
    step_s: float = STEP_S


@dataclass(slots=True)
class _Pair:
    agreement: Agreement
    result: asyncio.Future[Exchanged]
    accepted: bool = False
    """True iff we began to accept: from then on the partner may merge."""
    failure: PeerError | None = None
    """Why the exchange with this partner failed; None until it does."""


class MaskedMeeting(Gathering):
    """A group's masked exchange of one fragment: one snapshot, one sum, one merge.

    Args:
        trainer: ours.
        plan: see `round.MeetingPlan`.
        us: what all our masked groups have in common.
        before: step at which this fragment's values were last revealed but not merged; None = they
            never were.

    Attributes:
        revealed: local step of the values that we have revealed; None until we do.
        merged: True iff the trainer has queued the merge of the sum.
    """

    def __init__(
        self,
        trainer: Trainer,
        plan: MeetingPlan,
        us: MaskedGroup,
        before: int | None = None,
    ) -> None:
        super().__init__(trainer, plan)
        self._us, self._before = us, before
        self._pairs: dict[PeerId, _Pair] = {}
        self.revealed: int | None = None
        self.merged = False

    async def exchange(
        self, agreement: Agreement, *, weighting: Weighting, deadline_s: float
    ) -> Exchanged:
        """Add a partner, after both agreed to the exchange; ends when the group's meeting does.

        Raises:
            PeerError: we do not merge; `UnresolvedError` if the partner may.
        """
        del weighting, deadline_s  # a sum has equal weights, and the group has one deadline
        pair = _Pair(agreement, asyncio.get_running_loop().create_future())
        self._pairs[agreement.peer_id] = pair
        self._mark_arrived(agreement.peer_id)
        return await pair.result

    async def run(self) -> None:
        """Wait for the group, exchange, merge.

        Raises:
            PeerError: nobody came, or the trainer refused the merge after everybody accepted. Other
                failures are raised by `exchange`, for each partner.
            LocalError: the trainer failed.
        """
        error: PeerError | None = None
        try:
            await self._wait_for_partners()
            self.closed = True
            with _as_timeout(f"not within {self._us.deadline_s:g} s"):
                async with asyncio.timeout(self._us.deadline_s):
                    await self._meet()
        except PeerError as e:
            error = e
            if not self._pairs or self.accepted:
                raise
        except Exception as e:
            error = PeerError(Reason.TRAINER_RESTARTED, str(e))
            raise
        finally:
            self.closed = True
            if not self.merged:
                self._trainer.drop(self._id)
                await self._end_all_pairs(error)

    async def _meet(self) -> None:
        came = 1 + len(self._pairs)
        if came != self._us.size:
            raise PeerError(Reason.GROUP_TOO_SMALL, f"{came} of {self._us.size} came")
        update = await self._trainer.snapshot(self._id, self.fragment, averaging=self.averaging)
        self._require_unseen(update)
        roster, masked = await self._mask(update)
        commitments = await self._commit(roster, masked)
        self.revealed = update.step
        checked = await self._reveal(roster, masked, commitments)
        for pair in self._pairs.values():
            pair.accepted = True
        await self._with_all(lambda pair: pair.agreement.accept_both())
        await self._merge(checked.distance)

    # Before anything is revealed

    def _require_unseen(self, update: CompressedUpdate) -> None:
        if self._before == update.step:
            detail = "these values were revealed before and not merged"
            raise PeerError(Reason.REVEALED_BEFORE, detail)

    async def _mask(self, update: CompressedUpdate) -> tuple[bytes, MaskedUpdate]:
        """Draw keys, lock the roster, and hide our payload."""
        us, own = self._us, masks.Ephemeral()
        group = masks.Group(us.swarm_id, self.slot, self.fragment, update.form)
        # A partner may be in the middle of a long training step: only the deadline bounds this turn
        keys = await self._step("key", own.public, us.deadline_s)
        roster = group.roster({us.me: own.public, **keys})
        locks = await self._step("lock", roster)
        if any(lock != roster for lock in locks.values()):
            raise PeerError(Reason.WRONG_ROSTER, "a member sees other members or keys than we do")
        pair_keys = {
            peer: own.pair_key(group, roster, us.me, peer, theirs) for peer, theirs in keys.items()
        }
        masked = MaskedUpdate(memoryview(bytearray(update.payload)), update.form)
        rings = fixedpoint.rings(masked.form, masked.payload)
        await asyncio.to_thread(masks.mask, rings, us.me, pair_keys)
        return roster, masked

    async def _commit(self, roster: bytes, masked: MaskedUpdate) -> dict[PeerId, bytes]:
        """Everybody's commitment, ours included, once all have confirmed the same ones."""
        me, payload = self._us.me, memoryview(masked.payload)
        own = await asyncio.to_thread(masks.commitment, roster, me, payload)
        patience_s = self._us.step_s + payload.nbytes / BYTES_PER_S
        commitments = {me: own, **await self._step("commit", own, patience_s)}
        expected = masks.echo(roster, commitments)
        echoes = await self._step("echo", expected)
        if any(heard != expected for heard in echoes.values()):
            raise PeerError(Reason.EQUIVOCATION, "a member received other commitments than we did")
        return commitments

    async def _step(
        self,
        step: Literal["key", "lock", "commit", "echo"],
        value: bytes,
        patience_s: float | None = None,
    ) -> dict[PeerId, bytes]:
        """Send a value to every partner, and receive one from each."""

        async def turn(pair: _Pair) -> bytes:
            link, exchange_id = pair.agreement.link, pair.agreement.exchange_id
            with _as_timeout(f"no {step} in time"):
                async with asyncio.timeout(patience_s or self._us.step_s):
                    await link.send(MaskStep(exchange_id, step, value))
                    answer = await link.expect(MaskStep, exchange_id, timeout_s=float("inf"))
            if answer.step != step:
                raise PeerError(Reason.MALFORMED, f"{answer.step} instead of {step}")
            return answer.value

        return await self._with_all(turn)

    # From here on the partners have our masked values

    async def _reveal(
        self, roster: bytes, masked: MaskedUpdate, commitments: dict[PeerId, bytes]
    ) -> Checked:
        """Swap masked payloads, check them against the commitments, and have the sum decoded."""

        async def swapped(pair: _Pair) -> PeerUpdate:
            theirs, peer_id = await pair.agreement.swap(masked), pair.agreement.peer_id
            payload = memoryview(theirs.payload)
            actual = await asyncio.to_thread(masks.commitment, roster, peer_id, payload)
            if actual != commitments[peer_id]:
                raise PeerError(Reason.WRONG_COMMITMENT, "another payload than it committed to")
            return theirs

        received = await self._with_all(swapped)
        await asyncio.to_thread(_add, masked, received.values())
        for peer_id, theirs in received.items():
            self._pairs[peer_id].agreement.release(theirs)
        total = PeerUpdate(masked.payload, masked.form, peer_id="", parties=self._us.size)
        return await self._trainer.verify(self._id, _SUM, total)

    async def _merge(self, distance: float) -> None:
        """Move to the group's mean: (k - 1) / k of the way to the mean of the others."""
        for peer_id, pair in self._pairs.items():
            self.accepted[peer_id] = pair.agreement.exchange_id
            if not pair.result.done():
                pair.result.set_result(Exchanged(distance))
        await self._trainer.merge(self._id, {_SUM: (self._us.size - 1) / self._us.size})
        self.merged = True

    # All pairs at once; clean-up

    async def _with_all(self, turn: Callable[[_Pair], Awaitable[_T]]) -> dict[PeerId, _T]:
        """Take a turn with all partners at the same time; the first failure ends all of them.

        Raises:
            PeerError: GROUP_FAILED; `failure` of that pair has the cause.
        """

        async def one(pair: _Pair) -> _T:
            try:
                return await turn(pair)
            except PeerError as e:
                pair.failure = e
                raise PeerError(Reason.GROUP_FAILED, f"{pair.agreement.peer_id[-8:]}: {e}") from e

        tasks = [asyncio.ensure_future(one(pair)) for pair in self._pairs.values()]
        try:
            return dict(zip(self._pairs, await asyncio.gather(*tasks), strict=True))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _end_all_pairs(self, error: PeerError | None) -> None:
        """Tell partners that still wait for us why we do not merge, and abort all links: none is at
        a message boundary.

        Args:
            error: why we do not merge; None = we were cancelled, and send nothing.
        """
        pairs = [pair for pair in self._pairs.values() if not pair.result.done()]
        if error is not None:
            waiting = (p for p in pairs if p.failure is None and not p.accepted)
            await asyncio.gather(*(self._refuse(pair, error.reason) for pair in waiting))
        for pair in pairs:
            pair.agreement.link.abort()
            if not pair.result.done():
                pair.result.set_exception(_outcome(pair, error))

    async def _refuse(self, pair: _Pair, reason: str) -> None:
        if reason == Reason.REVEALED_BEFORE:
            reason = Reason.NOT_DUE  # the partner need not know that we revealed these values
        with contextlib.suppress(PeerError, TimeoutError):
            async with asyncio.timeout(self._us.step_s):
                await pair.agreement.refuse(reason)


def _outcome(pair: _Pair, error: PeerError | None) -> PeerError:
    if pair.accepted and not isinstance(pair.failure, RefusedError):
        return UnresolvedError(pair.agreement.exchange_id)  # it may have merged
    if pair.failure is not None:
        return pair.failure
    if error is None:
        return PeerError(Reason.CLOSED, "we were cancelled")
    return PeerError(error.reason, error.detail)


def _add(total: MaskedUpdate, received: Iterable[PeerUpdate]) -> None:
    """Add the partners' masked payloads to ours, in place. In the sum the masks cancel."""
    rings = fixedpoint.rings(total.form, total.payload)
    for theirs in received:
        fixedpoint.add_into(rings, fixedpoint.rings(theirs.form, theirs.payload))


@contextlib.contextmanager
def _as_timeout(detail: str) -> Iterator[None]:
    try:
        yield
    except TimeoutError as e:
        raise PeerError(Reason.TIMEOUT, detail) from e
