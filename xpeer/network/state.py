"""A joiner fetches the current parameters from a member, over the same sealed links.

The donor signs digest, step and its loss on the public text; the joiner checks size, digest and
signature here, and its trainer checks that loss before anything is trained or mixed.
What is handed out is what gossip hands out anyway: private already, in float32.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from xpeer.errors import PeerError, Reason
from xpeer.identity import Domain, PeerId, blake2b, verify
from xpeer.network.exchange import Dialler, Party
from xpeer.network.link import Link
from xpeer.update import ModelState
from xpeer.wire.messages import StateOffer, StateReceived, StateRequest, state_statement

PROTOCOL = "xpeer/state/1"
PREPARE_TIMEOUT_S = 300.0
"""The donor takes its snapshot at a step boundary, and a step of a large model is long."""
GIVE_TIMEOUT_S = 600.0
"""For one donation: a reader that takes a byte now and then holds a copy of all parameters."""
PAUSE_S = 10.0
"""Between two donations to the same peer: each costs the trainer a copy."""
MAX_LOSS_PUBLIC = 20.0
"""Nats per token; guessing among a million tokens makes 14. A donor that claims more could pass
anything off as what it claimed."""


class Source(Protocol):
    """Where a donor's parameters come from; the trainer in production."""

    async def export_state(self) -> ModelState:
        """Parameters at the next step boundary."""


def serving(
    party: Party, source: Callable[[], Source | None], max_donations: int
) -> Callable[[Link], Awaitable[None]]:
    """The handler of joiners.

    Args:
        party: us.
        source: the trainer, or None while there is nothing to give.
        max_donations: at the same time; more are refused.
    """
    last: dict[PeerId, float] = {}  # one entry per peer that was given to within PAUSE_S
    giving: set[PeerId] = set()

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
                async with asyncio.timeout(GIVE_TIMEOUT_S):
                    await _give(party, link, await trainer.export_state())
            except TimeoutError as e:
                raise PeerError(Reason.TIMEOUT, "the joiner takes too long") from e
            finally:
                giving.discard(link.peer_id)
                last[link.peer_id] = time.monotonic()
        finally:
            await link.close()

    return handle


async def _give(party: Party, link: Link, state: ModelState) -> None:
    digest = await asyncio.to_thread(blake2b, state.payload)
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
    await link.send_bulk(state.payload)
    reply = await link.receive(PREPARE_TIMEOUT_S)
    if not isinstance(reply, StateReceived) or reply.digest != digest:
        raise PeerError(Reason.DIGEST_MISMATCH, "the joiner did not receive what was sent")


async def fetch(
    party: Party, dialler: Dialler, donor: PeerId, num_params: int, timeout_s: float
) -> ModelState:
    """Fetch and check a member's parameters.

    Args:
        party: us.
        dialler: opens the stream.
        donor: whom to ask.
        num_params: of the manifest; any other size is refused before it is read.
        timeout_s: for all of it.

    Raises:
        PeerError: unreachable, busy, or anything does not match.
    """
    link = await dialler.open_link(donor, PROTOCOL, timeout_s)
    try:
        async with asyncio.timeout(timeout_s):
            await link.connect(party.handshake(donor, "state", initiator=True), initiator=True)
            await link.send(StateRequest())
            offer = await link.receive(PREPARE_TIMEOUT_S)
            if not isinstance(offer, StateOffer):
                raise PeerError(Reason.MALFORMED, "a state offer was due")
            _check_offer(party, donor, offer, num_params)
            payload, _ = await link.receive_bulk(4 * num_params)
            if await asyncio.to_thread(blake2b, payload) != offer.digest:
                raise PeerError(Reason.DIGEST_MISMATCH, "not the state that the donor signed")
            await link.send(StateReceived(offer.digest))
    except TimeoutError as e:
        raise PeerError(Reason.TIMEOUT, "the state did not arrive in time") from e
    finally:
        await link.close()
    return ModelState(payload=payload, step=offer.step, loss_public=offer.loss_public)


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
