"""One meeting of a masked group: nobody shows its values, all learn their sum.

Over the sealed links of the group's pairs, everybody with everybody, step by step; a step ends once
all have answered:

    key      a fresh X25519 key                   -> everybody can draw the masks
    lock     digest of the members and their keys -> all see the same group, and the same keys
    commit   digest of our masked payload         -> nobody can choose its own by ours
    echo     digest of all commitments            -> all were told the same ones
    reveal   the masked payloads                  -> each is what was committed to
    accept   the sum was decoded                  -> merge

A group has exactly the manifest's k members. With fewer, those who collude could drop the honest
ones until one is left among them; so whoever is missing or lost costs all the others this slot, and
the next slot is another attempt, with fresh keys and whatever group it brings. As long as nothing
was revealed, the same values may be tried again. From our reveal on they may not, in no group: with
another roster the difference of the two sums would be the values of those who are not in both, and
with the same one others may have merged, to a mean that is known. So what was shown in vain is
shown to nobody before a step has changed it, and a checkpoint's values neither.

A lie is noticed where it makes a difference: other keys for others (lock), other commitments
(echo), other payloads (reveal, or a refusal by whoever was shown another one). Who lied can't
always be told: what all agree on is that the slot is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Literal, TypeVar, Unpack

from xpeer.errors import PeerError, Reason
from xpeer.gossip import masks
from xpeer.identity import PeerId
from xpeer.network.agreement import Agreement, UnresolvedError
from xpeer.network.link import RefusedError
from xpeer.policies import Weighting
from xpeer.round import Exchanged, Gathering, Given, Trainer
from xpeer.update import Checked, CompressedUpdate, MaskedUpdate, PeerUpdate
from xpeer.wire import fixedpoint
from xpeer.wire.messages import MaskStep

STEP_S: Final = 5.0
"""For one step of one partner, and besides ..."""
BYTES_PER_S: Final = 50e6
"""... the time in which so much is masked and hashed."""
_SUM: Final = 0
"""The one exchange that the trainer sees of a masked meeting."""
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class MaskedGroup:
    """Who we are in masked groups, how large those are, and how patient we are."""

    me: PeerId
    swarm_id: str
    size: int
    """k."""
    deadline_s: float
    """For everything after the gathering."""
    step_s: float = STEP_S


@dataclass(slots=True)
class _Pair:
    agreement: Agreement
    result: asyncio.Future[Exchanged]
    accepted: bool = False
    """We accepted: the partner may merge."""
    failure: PeerError | None = None
    """What this partner did, or what became of it."""


class MaskedMeeting(Gathering):
    """A group's masked exchange of one fragment: one snapshot, one sum, one merge.

    Args:
        trainer: ours.
        us: who we are.
        before: local step of what we showed of this fragment, and of which nothing came.
        given: see `round.Given`.

    Attributes:
        revealed: local step of what we have shown; None = nothing yet.
        merged: the sum is on its way into the parameters.
    """

    def __init__(
        self,
        trainer: Trainer,
        us: MaskedGroup,
        before: int | None = None,
        **given: Unpack[Given],
    ) -> None:
        super().__init__(trainer, **given)
        self._us, self._before = us, before
        self._pairs: dict[PeerId, _Pair] = {}
        self.revealed: int | None = None
        self.merged = False

    async def exchange(
        self, agreement: Agreement, *, weighting: Weighting, deadline_s: float
    ) -> Exchanged:
        """Take part with this partner, after both agreed to; ends when the group's exchange does.

        Raises:
            PeerError: nothing is merged here; `UnresolvedError` if the partner may.
        """
        del weighting, deadline_s  # a sum has equal weights, and the group one deadline
        pair = _Pair(agreement, asyncio.get_running_loop().create_future())
        self._pairs[agreement.peer_id] = pair
        self._mark_arrived(agreement.peer_id)
        return await pair.result

    async def run(self) -> None:
        """Wait for the group, exchange, merge.

        Raises:
            PeerError: nobody came; what fails later is told to each pair.
            LocalError: the trainer.
        """
        error: PeerError | None = None
        try:
            await self._wait_for_partners()
            self.closed = True
            with _late(f"not within {self._us.deadline_s:g} s"):
                async with asyncio.timeout(self._us.deadline_s):
                    await self._meet()
        except PeerError as e:
            error = e
            if not self._pairs:
                raise
        except Exception as e:
            error = PeerError(Reason.TRAINER_RESTARTED, str(e))
            raise
        finally:
            self.closed = True
            if not self.merged:
                self._trainer.drop(self._id)
                await self._tell_all(error)

    async def _meet(self) -> None:
        came = 1 + len(self._pairs)
        if came != self._us.size:
            raise PeerError(Reason.GROUP_TOO_SMALL, f"{came} of {self._us.size} came")
        update = await self._trainer.snapshot(self._id, self.fragment, averaging=self.averaging)
        self._require_unseen(update)
        roster, masked = await self._mask(update)
        commitments = await self._commit(roster, masked)
        self.revealed = update.step
        found = await self._reveal(roster, masked, commitments)
        for pair in self._pairs.values():
            pair.accepted = True
        await self._with_all(lambda pair: pair.agreement.accept_both())
        await self._merge(found.distance)

    # Before anything is shown

    def _require_unseen(self, update: CompressedUpdate) -> None:
        if self._before == update.step:
            raise PeerError(Reason.REVEALED_BEFORE, "these very values were shown in vain")

    async def _mask(self, update: CompressedUpdate) -> tuple[bytes, MaskedUpdate]:
        """Draw keys, lock the roster, and hide our payload."""
        us, own = self._us, masks.Ephemeral()
        group = masks.Group(us.swarm_id, self.slot, self.fragment, update.form)
        # the partner may be in the middle of a long step: the group's deadline bounds this
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
        """Everybody's commitment, ours included, once all were told the same ones."""
        me, payload = self._us.me, memoryview(masked.payload)
        own = await asyncio.to_thread(masks.commitment, roster, me, payload)
        patience_s = self._us.step_s + payload.nbytes / BYTES_PER_S
        commitments = {me: own, **await self._step("commit", own, patience_s)}
        expected = masks.echo(roster, commitments)
        echoes = await self._step("echo", expected)
        if any(heard != expected for heard in echoes.values()):
            raise PeerError(Reason.EQUIVOCATION, "a member was told other commitments than we were")
        return commitments

    async def _step(
        self,
        step: Literal["key", "lock", "commit", "echo"],
        value: bytes,
        patience_s: float | None = None,
    ) -> dict[PeerId, bytes]:
        """Tell every partner, and hear every one."""

        async def turn(pair: _Pair) -> bytes:
            link, exchange_id = pair.agreement.link, pair.agreement.exchange_id
            with _late(f"no {step} in time"):
                async with asyncio.timeout(patience_s or self._us.step_s):
                    await link.send(MaskStep(exchange_id, step, value))
                    said = await link.expect(MaskStep, exchange_id, timeout_s=float("inf"))
            if said.step != step:
                raise PeerError(Reason.MALFORMED, f"{said.step} instead of {step}")
            return said.value

        return await self._with_all(turn)

    # From here on our values are out, under their masks

    async def _reveal(
        self, roster: bytes, masked: MaskedUpdate, commitments: dict[PeerId, bytes]
    ) -> Checked:
        """Swap what was committed to, check it, and have the sum decoded."""

        async def swapped(pair: _Pair) -> PeerUpdate:
            theirs, peer_id = await pair.agreement.swap(masked), pair.agreement.peer_id
            payload = memoryview(theirs.payload)
            shown = await asyncio.to_thread(masks.commitment, roster, peer_id, payload)
            if shown != commitments[peer_id]:
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

    # With everybody, and the end

    async def _with_all(self, turn: Callable[[_Pair], Awaitable[_T]]) -> dict[PeerId, _T]:
        """A turn with every partner at the same time; the first that fails ends all.

        Raises:
            PeerError: GROUP_FAILED; the pair that failed knows more.
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

    async def _tell_all(self, error: PeerError | None) -> None:
        """Why nothing is merged here, to whoever is still waiting for us; None = we were cancelled,
        and wait for nobody. No link is at a place from where it could be used again.
        """
        pairs = [pair for pair in self._pairs.values() if not pair.result.done()]
        if error is not None:
            untold = (p for p in pairs if p.failure is None and not p.accepted)
            await asyncio.gather(*(self._refuse(pair, error.reason) for pair in untold))
        for pair in pairs:
            pair.agreement.link.abort()
            if not pair.result.done():
                pair.result.set_exception(_outcome(pair, error))

    async def _refuse(self, pair: _Pair, reason: str) -> None:
        if reason == Reason.REVEALED_BEFORE:
            reason = Reason.NOT_DUE  # what was shown before is our matter
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
    """Total += all, in place: of the sum the masks are gone."""
    rings = fixedpoint.rings(total.form, total.payload)
    for theirs in received:
        fixedpoint.add_into(rings, fixedpoint.rings(theirs.form, theirs.payload))


@contextlib.contextmanager
def _late(detail: str) -> Iterator[None]:
    try:
        yield
    except TimeoutError as e:
        raise PeerError(Reason.TIMEOUT, detail) from e
