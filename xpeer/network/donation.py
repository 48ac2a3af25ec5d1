"""How joiners of earlier versions fetch parameters from a member; `giving` has the present way.

The donor signs digest, step and its loss on the public text. The joiner checks size, digest and
signature here. Its trainer checks that loss before anything is trained or mixed. A donation holds
what exchanges hand out anyway: private parameters, in float32.

All joiners that ask while a snapshot is fresh get the same one. There are two snapshots at most:
while an older one is still being sent, the newer one serves longer. A transfer has to be fast
enough as a whole (`rates`), and 256 KiB have to pass in every `link.FRAME_TIMEOUT_S`. If a transfer
breaks off, the donor keeps its snapshot for a while, and the joiner asks for the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final

from xpeer.errors import PeerError, Reason
from xpeer.identity import Domain, PeerId, blake2b, verify
from xpeer.manifest import StateForm
from xpeer.network import bulk
from xpeer.network.agreement import Dialler, Party
from xpeer.network.link import Link
from xpeer.network.pieces import MAX_LOSS_PUBLIC
from xpeer.network.rates import Pace, Rates
from xpeer.network.shelf import PREPARE_TIMEOUT_S, Shelf, Source
from xpeer.network.turns import Turns
from xpeer.network.uplink import Uplink
from xpeer.update import ModelState
from xpeer.wire.messages import StateOffer, StateReceived, StateRequest, state_statement

PROTOCOL = "xpeer/state/1"
DIAL_TIMEOUT_S = 30.0
WORTH: Final = 0.05
"""Fraction of the model. A donor keeps the snapshot of a broken transfer only if at least this much
was sent; less is sent e.g. to a joiner that chose another donor."""
RESUME_WITHIN_S = 60.0
"""A joiner tries this long at most to reach the donor again. Then it asks others for everything."""
RESUME_PAUSE_S, RESUME_PAUSE_MOST_S = 1.0, 8.0
BROKE: Final = frozenset({Reason.CLOSED, Reason.TRUNCATED, Reason.TIMEOUT})
"""Reasons that a broken link has. Any other is a fault of a peer."""
NOT_THERE: Final = frozenset({Reason.UNREACHABLE, Reason.TRUNCATED, Reason.TIMEOUT})
"""Reasons that a silent donor has. CLOSED is not among them: it is a donor's refusal."""

log = logging.getLogger("xpeer.network")


def serving(
    party: Party,
    source: Callable[[], Source | None],
    form: StateForm,
    turns: Turns,
    shelf: Shelf,
    uplink: Uplink,
) -> Callable[[Link], Awaitable[None]]:
    """The handler of links that joiners of earlier versions open to us.

    Args:
        party: us.
        source: returns the trainer, or None while there is nothing to give.
        form: of the parameters, by the manifest.
        turns: decides whether a joiner gets anything now.
        shelf: keeps snapshots.
        uplink: bounds what we send to all joiners together.
    """

    async def handle(link: Link) -> None:
        peer_id = link.peer_id
        try:
            await link.connect(party.handshake(peer_id, "state", initiator=False), initiator=False)
            request = await link.receive()
            if not isinstance(request, StateRequest):
                raise PeerError(Reason.MALFORMED, "a state request was due")
            trainer = source()
            if trainer is None or not await turns.may(peer_id, request):
                return  # the joiner sees a closed link and asks another member
            with turns.giving(link):
                async with shelf.lend(trainer, request.digest, end=link.abort) as lent:
                    pace, digest = turns.pace(peer_id, request), await lent.digest(form)
                    pace.queue = uplink.reserve
                    state = replace(lent.state, payload=await lent.whole(form))
                    whole, before = len(state.payload), pace.moved
                    try:
                        turns.sent(peer_id, digest, whole - before, whole)
                        await _give(party, link, state, digest, request.start, pace)
                        with turns.idle(peer_id):
                            await _receipt(link, digest)
                    except PeerError as e:
                        worth = pace.moved >= WORTH * whole
                        if e.reason in BROKE and worth:
                            turns.broke(peer_id, digest, pace)
                            shelf.keep(lent)
                        raise
                    finally:
                        turns.rates.saw(peer_id, pace.moved, pace.seconds)
                        turns.sent(peer_id, digest, pace.moved - whole, whole)  # not what was not
        finally:
            await link.close()

    return handle


async def _give(
    party: Party, link: Link, state: ModelState, digest: bytes, start: int, pace: Pace
) -> None:
    if start > len(state.payload):
        raise PeerError(Reason.MALFORMED, f"{start} bytes of {len(state.payload)} are there")
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
    await link.send_bulk(memoryview(state.payload)[start:], pace)


async def _receipt(link: Link, digest: bytes) -> None:
    reply = await link.receive(PREPARE_TIMEOUT_S)
    if not isinstance(reply, StateReceived) or reply.digest != digest:
        raise PeerError(Reason.DIGEST_MISMATCH, "the joiner did not receive what was sent")


class Offered:
    """A member's offer of its parameters, to be compared with other offers. Made by `ask`.

    Args:
        link: the parameters follow on it.
        donor: the member.
        offer: its signature and size are checked. Whether the parameters are good is not.
        rates: speeds of transfers so far.
        again: opens another link and asks for the rest of a broken transfer.

    Attributes:
        donor: the member.
        step: the donor's steps, as it claims.
        loss_public: the donor's loss on the public text, as it claims; nats per token.
    """

    def __init__(
        self,
        link: Link,
        donor: PeerId,
        offer: StateOffer,
        rates: Rates,
        again: Callable[[StateRequest], Awaitable[tuple[Link, StateOffer]]],
    ) -> None:
        self.donor, self.step, self.loss_public = donor, offer.step, offer.loss_public
        self._link, self._offer, self._rates, self._again = link, offer, rates, again

    async def take(self, *, others: bool = False) -> ModelState:
        """Receive the parameters and check their digest. If the link breaks, ask for the rest.

        Args:
            others: others hold parameters, too. What came is of use with this donor alone, so it
                is waited for as long as fetching that again would take, RESUME_WITHIN_S at most.

        Raises:
            PeerError: the transfer stalled, was too slow, or broke off for good, or the parameters
                are not those that the donor signed.
        """
        offer, pace = self._offer, Pace(self._rates.least(self.donor))
        payload = bulk.allocate(4 * offer.num_params)
        try:
            while True:
                try:
                    await self._link.receive_into(payload[pace.moved :], pace)
                    break
                except PeerError as e:
                    if e.reason not in BROKE:
                        raise
                    again_s = pace.seconds if others else RESUME_WITHIN_S
                    await self._resume(pace, e, min(again_s, RESUME_WITHIN_S))
            if await asyncio.to_thread(blake2b, payload) != offer.digest:
                raise PeerError(Reason.DIGEST_MISMATCH, "not the state that the donor signed")
            with contextlib.suppress(PeerError):  # all has arrived; the receipt may get lost
                await self._link.send(StateReceived(offer.digest))
        finally:
            self._rates.saw(self.donor, pace.moved, pace.seconds)
            await self._link.close()
        return ModelState(payload=payload, step=offer.step, loss_public=offer.loss_public)

    async def _resume(self, pace: Pace, broke: PeerError, within_s: float) -> None:
        """Replace the broken link by one that continues where it broke.

        Args:
            pace: of the whole transfer.
            broke: why the link broke.
            within_s: the donor has to answer by then.

        Raises:
            PeerError: the donor can't be reached or no longer has the snapshot, or the whole
                transfer takes too long.
        """
        clock = asyncio.get_running_loop().time
        until, pause_s = clock() + within_s, RESUME_PAUSE_S
        request = StateRequest(self._offer.digest, pace.moved)
        size = 4 * self._offer.num_params
        log.info("%s broke off at %d of %d bytes: %s", self.donor[-8:], pace.moved, size, broke)
        while True:
            await asyncio.sleep(pause_s)
            pace.allows_s(0)
            pause_s = min(2 * pause_s, RESUME_PAUSE_MOST_S)
            try:
                link, offer = await self._linked(request, until)
            except PeerError as e:
                if e.reason in NOT_THERE and clock() < until:
                    continue
                detail = f"it broke off at {pace.moved} of {size} bytes, and did not go on: {e}"
                raise PeerError(e.reason, detail) from broke
            self._link = link
            if offer.digest != self._offer.digest:
                raise PeerError(Reason.DIGEST_MISMATCH, "another state than the one that was begun")
            return

    async def _linked(self, request: StateRequest, until: float) -> tuple[Link, StateOffer]:
        """Ask for the rest; the donor has it, so it needs no time to prepare it."""
        try:
            async with asyncio.timeout_at(until):
                return await self._again(request)
        except TimeoutError as e:
            raise PeerError(Reason.TIMEOUT, "no answer in time") from e

    def refuse(self) -> None:
        """Decline the offer, because another one is better."""
        self._link.abort()


async def ask(
    party: Party, dialler: Dialler, donor: PeerId, num_params: int, rates: Rates | None = None
) -> Offered:
    """Ask a member for its parameters, and check its offer.

    Args:
        party: us.
        dialler: opens the stream.
        donor: the member to ask.
        num_params: `Model.state_values` of the manifest. Parameters of another size are refused
            before a byte is read.
        rates: speeds of transfers so far.

    Raises:
        PeerError: the member is unreachable or busy, or its offer does not match.
    """

    async def offered(request: StateRequest) -> tuple[Link, StateOffer]:
        link = await dialler.open_link(donor, PROTOCOL, DIAL_TIMEOUT_S)
        try:
            await link.connect(party.handshake(donor, "state", initiator=True), initiator=True)
            await link.send(request)
            offer = await link.receive(PREPARE_TIMEOUT_S)
            if not isinstance(offer, StateOffer):
                raise PeerError(Reason.MALFORMED, "a state offer was due")
            _check_offer(party, donor, offer, num_params)
        except BaseException:
            link.abort()
            raise
        return link, offer

    link, offer = await offered(StateRequest())
    return Offered(link, donor, offer, rates or Rates(), offered)


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
    if not 0 <= offer.loss_public <= MAX_LOSS_PUBLIC:
        raise PeerError(Reason.REFUSED, f"the donor's own loss is {offer.loss_public:.3g}")
