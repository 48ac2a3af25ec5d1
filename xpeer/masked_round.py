"""One meeting of a masked group: nobody shows its values, all learn their sum.

Over the sealed links of the group's pairs, everybody with everybody, step by step; a step ends once
all have answered:

    key      attempt, roster, fresh X25519 key    -> all see the same members
    lock     digest of the roster with all keys   -> all were shown the same keys
    commit   digest of our masked payload         -> nobody can choose its own by ours
    echo     digest of all commitments            -> all were told the same ones
    reveal   the masked payloads                  -> each is what was committed to
    accept   the sum was decoded                  -> merge

Whoever is lost before we echoed costs an attempt: those who are left draw new keys and try again,
at most `MAX_ATTEMPTS` times, while they are three or more. Nobody reveals before all have echoed,
so nothing was shown by then. From our reveal on there is no other attempt: with another roster the
difference of the two sums would be the values of the one who left. The slot is over for us, and
this fragment's values are shown to no other group while they stay as they are (`Revealed`).

A lie is noticed where it makes a difference: other keys for others (lock), other commitments
(echo), other payloads (reveal, or a refusal by whoever was shown another one). Who lied can't be
told in general: what all agree on is that the slot is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, Literal, TypeVar, Unpack

from xpeer.errors import PeerError, Reason
from xpeer.identity import PeerId
from xpeer.network.exchange import Agreement, UnresolvedError
from xpeer.privacy import masks
from xpeer.privacy.masks import MIN_GROUP
from xpeer.round import Exchanged, Gathering, Given, Trainer
from xpeer.update import CompressedUpdate, MaskedUpdate, PeerUpdate
from xpeer.weights import Weighting
from xpeer.wire import fixedpoint
from xpeer.wire.messages import Masking, MaskKey, MaskStep

MAX_ATTEMPTS: Final = 3
STEP_S: Final = 5.0
"""For one step of one partner, and besides ..."""
BYTES_PER_S: Final = 50e6
"""... the time in which so much is masked and hashed."""
_SUM: Final = 0
"""The one exchange that the trainer sees of a masked meeting."""
_STALE: Final = 3
"""Steps of an attempt that was given up, still on the way."""
_M = TypeVar("_M", MaskKey, MaskStep)


@dataclass(frozen=True, slots=True)
class Revealed:
    """Values that were shown under masks, and of which nothing came."""

    step: int
    """Local step of the snapshot."""
    members: frozenset[PeerId]


@dataclass(slots=True)
class _Pair:
    agreement: Agreement
    result: asyncio.Future[Exchanged]
    accepted: bool = False
    """We accepted: the partner may merge."""
    early: MaskKey | None = None
    """Of the next attempt."""


class _AgainError(Exception):
    """This attempt is given up before anything was shown."""

    def __init__(self, members: frozenset[PeerId]) -> None:
        self.members = members


class _InterruptedError(Exception):
    """The partner began another attempt."""


@dataclass(frozen=True, slots=True)
class Us:
    """Who we are in masked groups, and how patient."""

    me: PeerId
    swarm_id: str
    deadline_s: float
    """For everything after the gathering."""
    step_s: float = STEP_S


@dataclass(slots=True)
class _Masked:
    """Our payload under an attempt's masks."""

    roster: bytes
    update: MaskedUpdate
    commitments: dict[PeerId, bytes] = field(default_factory=dict)


class MaskedMeeting(Gathering):
    """A group's masked exchange of one fragment: one snapshot, one sum, one merge.

    Args:
        trainer: ours.
        us: who we are.
        before: what we showed of this fragment in a group that failed.
        given: see `round.Given`.

    Attributes:
        revealed: what we have shown; None = nothing yet.
        merged: the sum is on its way into the parameters.
    """

    def __init__(
        self,
        trainer: Trainer,
        us: Us,
        before: Revealed | None = None,
        **given: Unpack[Given],
    ) -> None:
        super().__init__(trainer, **given)
        self._us, self._before = us, before
        self._pairs: dict[PeerId, _Pair] = {}
        self._lost: set[PeerId] = set()
        self.revealed: Revealed | None = None
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
        self._comes(agreement.peer_id)
        return await pair.result

    async def run(self) -> None:
        """Wait for the group, exchange, merge.

        Raises:
            PeerError: nobody came; what fails later is told to each pair.
            LocalError: the trainer.
        """
        error: PeerError | None = None
        try:
            await self._gathered()
            self.closed = True
            try:
                async with asyncio.timeout(self._us.deadline_s):
                    await self._meet()
            except TimeoutError as e:
                raise PeerError(Reason.TIMEOUT, f"{self._us.deadline_s:g} s for the group") from e
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
        members = frozenset({self._us.me, *self._pairs})
        _require_group(members)
        update = await self._trainer.snapshot(self._id, self.fragment, averaging=self.averaging)
        for number in range(MAX_ATTEMPTS):
            try:
                masked = await self._prepare(number, members, update)
            except _AgainError as again:
                members = again.members
                continue
            distance = await self._reveal(members, update, masked)
            await self._settle(members)
            await self._merge(members, distance)
            return
        raise PeerError(Reason.GROUP_CHANGED, f"no roster in {MAX_ATTEMPTS} attempts")

    # Before anything is shown

    async def _prepare(
        self, number: int, members: frozenset[PeerId], update: CompressedUpdate
    ) -> _Masked:
        """Keys, lock, commitments and echo of one attempt."""
        _require_group(members)
        self._require_unseen(members, update)
        keys = _FreshKeys(self._us.me, self._attempt(number, update))
        keys.add(await self._agree_on_roster(number, members, keys.ephemeral.public))
        locks = await self._step(number, "lock", keys.roster, members)
        if any(digest != keys.roster for digest in locks.values()):
            raise PeerError(Reason.WRONG_ROSTER, "a member saw other keys than we did")
        masked = await asyncio.to_thread(keys.mask, update)
        own = await asyncio.to_thread(
            masks.commitment, keys.roster, self._us.me, memoryview(masked.payload)
        )
        commitments = await self._step(number, "commit", own, members, len(masked.payload))
        commitments[self._us.me] = own
        expected = masks.echo(keys.roster, commitments)
        echoes = await self._step(number, "echo", expected, members)
        if any(digest != expected for digest in echoes.values()):
            raise PeerError(Reason.EQUIVOCATION, "a member was told other commitments than we were")
        return _Masked(keys.roster, masked, commitments)

    def _attempt(self, number: int, update: CompressedUpdate) -> masks.Attempt:
        us, what = self._us, (update.codec, update.num_values)
        return masks.Attempt(us.swarm_id, self.slot, self.fragment, number, *what)

    async def _agree_on_roster(
        self, number: int, members: frozenset[PeerId], public: bytes
    ) -> dict[PeerId, bytes]:
        """Everybody's fresh keys, ours included, once all see the same members."""
        roster = sorted(members)

        def message(agreement: Agreement) -> MaskKey:
            return MaskKey(agreement.exchange_id, number, list(roster), public)

        said = await self._all_say(number, MaskKey, message, members, self._us.deadline_s)
        common = members.intersection(*(answer.roster for answer in said.values()))
        if self._us.me not in common:
            raise PeerError(Reason.GROUP_CHANGED, "the others go on without us")
        if any(answer.roster != roster for answer in said.values()):
            for peer_id in members - common:
                self._lose(peer_id, PeerError(Reason.GROUP_CHANGED, "not all see it"))
            raise _AgainError(common)
        return {self._us.me: public, **{peer: answer.key for peer, answer in said.items()}}

    def _require_unseen(self, members: frozenset[PeerId], update: CompressedUpdate) -> None:
        before = self._before
        if before is not None and before.step == update.step and before.members != members:
            raise PeerError(
                Reason.REVEALED_BEFORE, "another group was shown these very values and failed"
            )

    async def _step(
        self,
        number: int,
        step: Literal["lock", "commit", "echo"],
        digest: bytes,
        members: frozenset[PeerId],
        num_bytes: int = 0,
    ) -> dict[PeerId, bytes]:
        def message(agreement: Agreement) -> MaskStep:
            return MaskStep(agreement.exchange_id, number, step, digest)

        patience_s = self._us.step_s + num_bytes / BYTES_PER_S
        said = await self._all_say(
            number, MaskStep, message, members, patience_s, last=step == "echo"
        )
        if any(answer.step != step for answer in said.values()):
            raise PeerError(Reason.MALFORMED, f"another step than {step}")
        return {peer: answer.digest for peer, answer in said.items()}

    async def _all_say(
        self,
        number: int,
        kind: type[_M],
        message: Callable[[Agreement], _M],
        members: frozenset[PeerId],
        patience_s: float,
        *,
        last: bool = False,
    ) -> dict[PeerId, _M]:
        """Tell every partner, and hear every one.

        Args:
            number: of the attempt.
            kind: what is said.
            message: to one partner.
            members: of the attempt.
            patience_s: with each.
            last: after it others may reveal, so that who is lost now ends all.

        Raises:
            _AgainError: somebody was lost, or gave this attempt up.
        """
        peers = sorted(members - {self._us.me})

        async def turn(peer_id: PeerId) -> _M:
            pair = self._pairs[peer_id]
            with _late(f"no {kind.__name__} in time"):
                async with asyncio.timeout(patience_s):
                    await pair.agreement.link.send(message(pair.agreement))
                    return await self._hear(pair, number, kind)

        answers = await asyncio.gather(*map(turn, peers), return_exceptions=True)
        said: dict[PeerId, _M] = {}
        interrupted = False
        for peer_id, answer in zip(peers, answers, strict=True):
            if isinstance(answer, PeerError):
                self._lose(peer_id, answer)
            elif isinstance(answer, _InterruptedError):
                interrupted = True
            elif isinstance(answer, BaseException):
                raise answer
            else:
                said[peer_id] = answer
        if len(said) == len(peers):
            return said
        if last and not interrupted:
            raise PeerError(Reason.GROUP_CHANGED, "a member was lost at the last moment")
        raise _AgainError(members - self._lost)

    async def _hear(self, pair: _Pair, number: int, kind: type[_M]) -> _M:
        if kind is MaskKey and pair.early is not None:
            early, pair.early = pair.early, None
            return _of_attempt(early, number, kind)
        link, exchange_id = pair.agreement.link, pair.agreement.exchange_id
        for _ in range(_STALE + 1):
            answer = await link.expect(Masking, exchange_id, timeout_s=float("inf"))
            if answer.attempt < number:
                continue
            if kind is MaskStep and isinstance(answer, MaskKey) and answer.attempt == number + 1:
                pair.early = answer
                raise _InterruptedError
            return _of_attempt(answer, number, kind)
        raise PeerError(Reason.MALFORMED, "too much of an attempt that was given up")

    # From here on our values are out, under their masks

    async def _reveal(
        self, members: frozenset[PeerId], update: CompressedUpdate, masked: _Masked
    ) -> float:
        """Swap what was committed to, check it, and have the sum decoded."""
        self.revealed = Revealed(update.step, members)
        peers = sorted(members - {self._us.me})
        received = await _together(
            [self._pairs[peer].agreement.swap(masked.update) for peer in peers]
        )
        total = masked.update.payload
        for peer_id, theirs in zip(peers, received, strict=True):
            await asyncio.to_thread(_add, total, theirs, masked, peer_id)
            self._pairs[peer_id].agreement.release(theirs)
        summed = PeerUpdate(
            payload=total,
            codec=update.codec,
            num_values=update.num_values,
            peer_id="",
            parties=len(members),
        )
        return await self._trainer.verify(self._id, _SUM, summed)

    async def _settle(self, members: frozenset[PeerId]) -> None:
        """All accept, or we don't merge."""
        pairs = [self._pairs[peer] for peer in members - {self._us.me}]
        for pair in pairs:
            pair.accepted = True
        await _together([pair.agreement.settle() for pair in pairs])

    async def _merge(self, members: frozenset[PeerId], distance: float) -> None:
        """Move to the group's mean: (k - 1) / k of the way to the mean of the others."""
        for peer_id in members - {self._us.me}:
            pair = self._pairs[peer_id]
            self.accepted[peer_id] = pair.agreement.exchange_id
            done = Exchanged(distance, pair.agreement.num_bytes, pair.agreement.num_values)
            if not pair.result.done():
                pair.result.set_result(done)
        weight = (len(members) - 1) / len(members)
        await self._trainer.merge(self._id, {_SUM: weight})
        self.merged = True

    # The end

    def _lose(self, peer_id: PeerId, error: PeerError) -> None:
        """This partner is out: its link is at no known place any more."""
        pair = self._pairs[peer_id]
        self._lost.add(peer_id)
        pair.agreement.link.abort()
        if not pair.result.done():
            pair.result.set_exception(error)

    async def _tell_all(self, error: PeerError | None) -> None:
        """Why nothing is merged here, to whoever is still waiting for us; None = we were cancelled,
        and wait for nobody.
        """
        pairs = [pair for pair in self._pairs.values() if not pair.result.done()]
        if error is not None:
            waiting = (self._refuse(pair, error.reason) for pair in pairs if not pair.accepted)
            await asyncio.gather(*waiting)
        for pair in pairs:
            pair.agreement.link.abort()
            if pair.result.done():
                continue
            if pair.accepted:  # it may have merged, alone or with others
                pair.result.set_exception(UnresolvedError(pair.agreement.exchange_id))
            else:
                pair.result.set_exception(error or PeerError(Reason.CLOSED, "we were cancelled"))

    async def _refuse(self, pair: _Pair, reason: str) -> None:
        if reason == Reason.REVEALED_BEFORE:
            reason = Reason.NOT_DUE  # what was shown before is our matter
        with contextlib.suppress(PeerError, TimeoutError):
            async with asyncio.timeout(self._us.step_s):
                await pair.agreement.refuse(reason)


class _FreshKeys:
    """One attempt's own key, and everybody's public ones."""

    def __init__(self, me: PeerId, attempt: masks.Attempt) -> None:
        self._me, self._attempt = me, attempt
        self.ephemeral = masks.Ephemeral()
        self.roster = b""
        self._public: dict[PeerId, bytes] = {}

    def add(self, public: dict[PeerId, bytes]) -> None:
        """All members' fresh keys, ours included."""
        self._public, self.roster = public, self._attempt.roster(public)

    def mask(self, update: CompressedUpdate) -> MaskedUpdate:
        """A masked copy: the next attempt, if there is one, needs the original."""
        keys = {
            peer: self.ephemeral.pair_key(self._attempt, self.roster, self._me, peer, theirs)
            for peer, theirs in self._public.items()
            if peer != self._me
        }
        payload = bytearray(update.payload)
        masks.mask(fixedpoint.rings(update.codec, payload, update.num_values), self._me, keys)
        return MaskedUpdate(memoryview(payload), update.codec, update.num_values)


def _require_group(members: frozenset[PeerId]) -> None:
    if len(members) < MIN_GROUP:
        raise PeerError(Reason.GROUP_TOO_SMALL, f"{len(members)} of at least {MIN_GROUP}")


def _of_attempt(answer: Masking, number: int, kind: type[_M]) -> _M:
    if not isinstance(answer, kind) or answer.attempt != number:
        raise PeerError(Reason.MALFORMED, f"{type(answer).__name__} of another step or attempt")
    return answer


def _add(total: bytes | memoryview, theirs: PeerUpdate, masked: _Masked, peer_id: PeerId) -> None:
    """Check a masked payload against its commitment, and add it."""
    said = masks.commitment(masked.roster, peer_id, memoryview(theirs.payload))
    if said != masked.commitments[peer_id]:
        raise PeerError(Reason.WRONG_COMMITMENT, "another payload than it committed to")
    codec, num_values = masked.update.codec, masked.update.num_values
    fixedpoint.add_into(
        fixedpoint.rings(codec, total, num_values),
        fixedpoint.rings(codec, theirs.payload, num_values),
    )


_T = TypeVar("_T")


async def _together(work: list[Awaitable[_T]]) -> list[_T]:
    """All of it; the first that fails ends the others."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def _late(detail: str) -> Iterator[None]:
    try:
        yield
    except TimeoutError as e:
        raise PeerError(Reason.TIMEOUT, detail) from e
