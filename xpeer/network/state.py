"""A joiner fetches the current parameters from a member, over the same sealed links.

The donor signs digest, step and its loss on the public text; the joiner checks size, digest and
signature here, and its trainer checks that loss before anything is trained or mixed.
What is handed out is what gossip hands out anyway: private already, in float32.

One snapshot serves all who ask while it is fresh, and longer while one before it is still on its
way to somebody: there are two at most. A transfer has to be fast enough as a whole (`rates`), and
256 KiB have to pass in every `link.FRAME_TIMEOUT_S`. One that breaks off begins anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

from xpeer.errors import PeerError, Reason
from xpeer.identity import Domain, PeerId, blake2b, verify
from xpeer.network.exchange import Dialler, Party
from xpeer.network.link import Link
from xpeer.network.rates import Pace, Rates
from xpeer.update import ModelState
from xpeer.wire.messages import StateOffer, StateReceived, StateRequest, state_statement

PROTOCOL = "xpeer/state/1"
PREPARE_TIMEOUT_S = 300.0
"""The donor takes its snapshot at a step boundary, and a step of a large model is long."""
FRESH_S, FRESH_COST = 20.0, 20.0
"""A snapshot is handed out for so long, or for so many times as long as it took: joiners, however
many, cost a twentieth of the donor's time at most."""
DIAL_TIMEOUT_S = 30.0
PAUSE_S = 10.0
"""Between two donations to the same peer: each costs the trainer a copy."""
MAX_LOSS_PUBLIC = 20.0
"""Nats per token; guessing among a million tokens makes 14. A donor that claims more could pass
anything off as what it claimed."""


class Source(Protocol):
    """Where a donor's parameters come from; the trainer in production."""

    async def export_state(self) -> ModelState:
        """Parameters at the next step boundary."""


class Shelf:
    """The last snapshot, while it is fresh; one at a time is taken.

    Args:
        clock: monotonic, seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = asyncio.Lock()
        self._kept: tuple[Source, ModelState, bytes] | None = None
        self._until = 0.0
        self._lent: list[ModelState] = []

    @contextlib.asynccontextmanager
    async def lend(self, source: Source) -> AsyncIterator[tuple[ModelState, bytes]]:
        """As `get`; while it is lent no third one is taken.

        Raises:
            PeerError: it has none to give.
        """
        state, digest = await self.get(source)
        self._lent.append(state)
        try:
            yield state, digest
        finally:
            self._lent = _without_one(self._lent, state)
            if self._clock() >= self._until:
                self._forget(state)

    async def get(self, source: Source) -> tuple[ModelState, bytes]:
        """A snapshot of this trainer, and its digest; of none before it.

        Raises:
            PeerError: it has none to give.
        """
        async with self._lock:
            kept = self._kept
            if kept is not None and kept[0] is not source:
                kept = self._kept = None
            if len({id(state) for state in self._lent}) > 1:
                if kept is None:
                    raise PeerError(Reason.BUSY, "two snapshots are on their way already")
            elif kept is None or self._clock() >= self._until:
                self._kept = None  # free it before there are two
                began = self._clock()
                state = await source.export_state()
                digest = await asyncio.to_thread(blake2b, state.payload)
                now = self._clock()
                self._until = now + max(FRESH_S, FRESH_COST * (now - began))
                kept = self._kept = (source, state, digest)
                asyncio.get_running_loop().call_later(self._until - now, self._forget, state)
            return kept[1], kept[2]

    def _forget(self, state: ModelState) -> None:
        """It takes as much memory as the model."""
        lent = any(each is state for each in self._lent)
        if self._kept is not None and self._kept[1] is state and not lent:
            self._kept = None


def _without_one(states: list[ModelState], state: ModelState) -> list[ModelState]:
    place = next(number for number, each in enumerate(states) if each is state)
    return states[:place] + states[place + 1 :]


def serving(
    party: Party,
    source: Callable[[], Source | None],
    max_donations: int,
    rates: Rates | None = None,
) -> Callable[[Link], Awaitable[None]]:
    """The handler of joiners.

    Args:
        party: us.
        source: the trainer, or None while there is nothing to give.
        max_donations: at the same time; more are refused.
        rates: what others reached; a joiner that takes it too slowly is dropped.
    """
    seen = rates or Rates()
    last: dict[PeerId, float] = {}  # one entry per peer that was given to within PAUSE_S
    giving: set[PeerId] = set()
    shelf = Shelf()

    def has_turn(peer_id: PeerId) -> bool:
        now = time.monotonic()
        for peer, ended in list(last.items()):
            if now - ended >= PAUSE_S:
                del last[peer]
        return peer_id not in last and peer_id not in giving and len(giving) < max_donations

    async def handle(link: Link) -> None:
        try:
            handshake = party.handshake(link.peer_id, "state", initiator=False)
            await link.connect(handshake, initiator=False)
            if not isinstance(await link.receive(), StateRequest):
                raise PeerError(Reason.MALFORMED, "a state request was due")
            trainer = source()
            if trainer is None or not has_turn(link.peer_id):
                return  # the joiner sees a closed link and asks another member
            giving.add(link.peer_id)
            try:
                async with shelf.lend(trainer) as (state, digest):
                    await _give(party, link, state, digest, seen)
            finally:
                giving.discard(link.peer_id)
                last[link.peer_id] = time.monotonic()
        finally:
            await link.close()

    return handle


async def _give(party: Party, link: Link, state: ModelState, digest: bytes, rates: Rates) -> None:
    statement = state_statement(
        party.swarm_id, party.manifest_hash, state.step, state.loss_public, digest
    )
    await link.send(
        StateOffer(
            num_params=len(state.payload) // 4,
            step=state.step,
            loss_public=state.loss_public,
            digest=digest,
            signature=party.identity.sign(Domain.STATE, statement),
        )
    )
    pace = Pace(rates.least(link.peer_id))
    try:
        await link.send_bulk(state.payload, pace)
    finally:
        rates.saw(link.peer_id, pace.moved, pace.seconds)
    reply = await link.receive(PREPARE_TIMEOUT_S)
    if not isinstance(reply, StateReceived) or reply.digest != digest:
        raise PeerError(Reason.DIGEST_MISMATCH, "the joiner did not receive what was sent")


class Offered:
    """What a member would give: compare it with others' before it is taken. Made by `ask`.

    Args:
        link: on which it follows.
        donor: who.
        offer: signed and checked, but for what the parameters really are.
        rates: what others reached.
    """

    def __init__(self, link: Link, donor: PeerId, offer: StateOffer, rates: Rates) -> None:
        self.donor, self.step, self.loss_public = donor, offer.step, offer.loss_public
        self._link, self._offer, self._rates = link, offer, rates

    async def take(self) -> ModelState:
        """Receive and check it.

        Raises:
            PeerError: it stalled, was slow, broke off, or is not what was signed.
        """
        offer, pace = self._offer, Pace(self._rates.least(self.donor))
        try:
            payload, _ = await self._link.receive_bulk(4 * offer.num_params, pace)
            if await asyncio.to_thread(blake2b, payload) != offer.digest:
                raise PeerError(Reason.DIGEST_MISMATCH, "not the state that the donor signed")
            await self._link.send(StateReceived(offer.digest))
        finally:
            self._rates.saw(self.donor, pace.moved, pace.seconds)
            await self._link.close()
        return ModelState(payload=payload, step=offer.step, loss_public=offer.loss_public)

    def refuse(self) -> None:
        """Another one is better."""
        self._link.abort()


async def ask(
    party: Party, dialler: Dialler, donor: PeerId, num_params: int, rates: Rates | None = None
) -> Offered:
    """Ask a member for its parameters, and check what it says of them.

    Args:
        party: us.
        dialler: opens the stream.
        donor: whom to ask.
        num_params: `Model.state_values` of the manifest; any other size is refused before it is
            read.
        rates: what others reached.

    Raises:
        PeerError: unreachable, busy, or anything does not match.
    """
    link = await dialler.open_link(donor, PROTOCOL, DIAL_TIMEOUT_S)
    try:
        await link.connect(party.handshake(donor, "state", initiator=True), initiator=True)
        await link.send(StateRequest())
        offer = await link.receive(PREPARE_TIMEOUT_S)
        if not isinstance(offer, StateOffer):
            raise PeerError(Reason.MALFORMED, "a state offer was due")
        _check_offer(party, donor, offer, num_params)
    except BaseException:
        link.abort()
        raise
    return Offered(link, donor, offer, rates or Rates())


def _check_offer(party: Party, donor: PeerId, offer: StateOffer, num_params: int) -> None:
    statement = state_statement(
        party.swarm_id, party.manifest_hash, offer.step, offer.loss_public, offer.digest
    )
    if not verify(donor, Domain.STATE, statement, offer.signature):
        raise PeerError(Reason.TAMPERED, "the donor did not sign this state")
    if offer.num_params != num_params:
        raise PeerError(
            Reason.WRONG_MODEL, f"{offer.num_params} parameters, the manifest has {num_params}"
        )
    if not math.isfinite(offer.loss_public):
        raise PeerError(Reason.NOT_FINITE, "the donor's own loss is not finite")
    if offer.loss_public > MAX_LOSS_PUBLIC:
        raise PeerError(Reason.REFUSED, f"the donor's own loss is {offer.loss_public:.3g}")
