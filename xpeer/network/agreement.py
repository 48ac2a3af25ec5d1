"""An exchange with a partner: agree on it, swap the two payloads over a sealed link, accept.

Of two peers, the one with the lower PeerID opens the link, keeps it open, and proposes:

    PROPOSE -> AGREE, or REFUSE(reason)
    PAYLOAD + frames  <->  PAYLOAD + frames
    ACCEPT            <->  ACCEPT

Both merge only after both accepted. Exact atomicity is impossible. A side that accepted and heard
nothing more does not merge. At the next contact it names that exchange, and the partner can count
its one-sided merge.

This module knows neither models nor privacy. It moves bytes that are private already.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from xpeer.errors import PeerError, Reason
from xpeer.forms import Form
from xpeer.identity import Identity, PeerId
from xpeer.network import bulk
from xpeer.network.link import Link, RefusedError
from xpeer.network.membership.certificates import Membership, Scope
from xpeer.network.membership.keyring import KeyRing
from xpeer.update import CompressedUpdate, MaskedUpdate, PeerUpdate
from xpeer.wire.messages import Accept, Agree, Payload, Propose, Refuse, Terms
from xpeer.wire.session import Credentials, Handshake, Purpose

PROTOCOL = "xpeer/exchange/1"
IDLE_TIMEOUT_S = 900.0
"""A link is closed after this long without a proposal."""
KEPT_S = IDLE_TIMEOUT_S - 60.0
"""The proposer drops a link after this long without a proposal, before the other end does."""
_ENDED = frozenset({Reason.TRUNCATED, Reason.CLOSED})
"""Failures of a kept link that say nothing about the partner: its process was started again, or it
closed the link while nothing happened."""
PROPOSAL_INTERVAL_S = 0.05
"""Least time between two proposals of a partner. An honest one proposes once a slot."""


@dataclass(frozen=True, slots=True)
class Party:
    """Our identity and our view of the swarm, as every handshake needs them."""

    identity: Identity
    swarm_id: str
    keyring: KeyRing
    manifest_hash: bytes
    serial: int
    membership: Membership

    def handshake(self, partner: PeerId, purpose: Purpose, *, initiator: bool) -> Handshake:
        """A fresh handshake with this partner.

        Raises:
            PeerError: NOT_A_MEMBER: its certificate does not allow this. Only members exchange and
                give their parameters; observers may fetch them.
        """
        reads = purpose == "state" and not initiator
        self.require(partner, "observer" if reads else "member")
        own = Credentials(
            self.identity, self.swarm_id, self.keyring, self.manifest_hash, self.serial
        )
        return Handshake(own, partner, purpose=purpose, initiator=initiator)

    def require(self, partner: PeerId, scope: Scope) -> None:
        """Check the partner's certificate, which may have expired since its link was opened.

        Raises:
            PeerError: NOT_A_MEMBER.
        """
        if not self.membership.allows(partner, scope):
            raise PeerError(Reason.NOT_A_MEMBER, f"its certificate does not allow {scope}")


class Dialler(Protocol):
    """Opens raw streams; `network.swarm.Swarm` in production."""

    async def open_link(self, peer_id: PeerId, protocol: str, timeout_s: float) -> Link:
        """An open link to a member, before its handshake. Raises PeerError."""


class ProposalHandler(Protocol):
    """What this node answers to proposals; the daemon's gossip in production."""

    def terms(self, peer_id: PeerId, slot: int) -> Terms:
        """Our terms towards this partner in this slot."""

    def refusal_of(self, peer_id: PeerId, proposal: Propose) -> str | None:
        """The reason code for refusing this proposal; None if we agree."""

    def before_agreement(self, peer_id: PeerId, theirs: Terms) -> None:
        """Check the partner's terms, and count our merges that it reports as one-sided.

        Raises:
            PeerError: the partner's ledger went back.
        """

    async def take_part(self, agreement: Agreement) -> None:
        """Run the exchange on the answering side."""


@dataclass(slots=True)
class Digests:
    """Digests of the frames of both payloads; empty until `swap` has moved them."""

    sent: bytes = b""
    received: bytes = b""


@dataclass(frozen=True, slots=True)
class Agreement:
    """An exchange of one fragment that both sides agreed to."""

    link: Link
    exchange_id: int
    slot: int
    fragment: int
    averaging: bool
    form: Form
    """Form of both payloads. Their size follows from it, whatever a partner announces."""
    ours: Terms
    theirs: Terms
    digests: Digests = field(default_factory=Digests, init=False)

    @property
    def peer_id(self) -> PeerId:
        """The partner."""
        return self.link.peer_id

    async def swap(self, update: CompressedUpdate | MaskedUpdate) -> PeerUpdate:
        """Send our update and receive the partner's, at the same time.

        Raises:
            PeerError: the size or a frame is wrong, or the stream broke or stalled.
        """
        if update.form != self.form or len(update.payload) != self.form.num_bytes:
            raise PeerError(Reason.WRONG_MODEL, "our own update is not of the agreed form")
        sending = asyncio.ensure_future(self._send(update.payload))
        receiving = asyncio.ensure_future(self._receive())
        try:
            await asyncio.gather(sending, receiving)
        finally:
            for task in (sending, receiving):
                task.cancel()
            await asyncio.gather(sending, receiving, return_exceptions=True)
        payload, self.digests.received = receiving.result()
        self.digests.sent = sending.result()
        return PeerUpdate(payload, self.form, self.peer_id)

    async def _send(self, payload: bytes | memoryview) -> bytes:
        await self.link.send(Payload(self.exchange_id, self.form.num_bytes))
        return await self.link.send_bulk(payload)

    async def _receive(self) -> tuple[memoryview, bytes]:
        # The partner may be in the middle of a long step. The exchange's own deadline bounds this.
        announced = await self.link.expect(Payload, self.exchange_id, timeout_s=float("inf"))
        agreed = self.form.num_bytes
        if announced.num_bytes != agreed:
            raise PeerError(
                Reason.OVERSIZE if announced.num_bytes > agreed else Reason.MALFORMED,
                f"{announced.num_bytes} bytes announced, {agreed} agreed",
            )
        return await self.link.receive_bulk(agreed)

    def release(self, received: PeerUpdate) -> None:
        """Give back the memory of a payload from `swap`; nobody may refer to it any more."""
        if isinstance(received.payload, memoryview):
            bulk.release(received.payload)

    async def accept_both(self) -> None:
        """Accept the partner's update and wait until it accepts ours.

        Raises:
            UnresolvedError: we accepted and can't know whether the partner merges.
            PeerError: it refused, or accepted another payload than ours (DIGEST_MISMATCH).
        """
        await self.link.send(Accept(self.exchange_id, self.digests.received))
        try:
            theirs = await self.link.expect(Accept, self.exchange_id, timeout_s=float("inf"))
        except RefusedError:
            raise
        except (PeerError, asyncio.CancelledError) as e:
            raise UnresolvedError(self.exchange_id) from e
        if theirs.digest != self.digests.sent:
            raise PeerError(Reason.DIGEST_MISMATCH, "it accepted something else than ours")

    async def refuse(self, reason: str) -> None:
        """Tell the partner why we do not merge."""
        await self.link.send(Refuse(self.exchange_id, reason))


class UnresolvedError(PeerError):
    """We accepted, and no answer came. The partner may have merged alone."""

    def __init__(self, exchange_id: int) -> None:
        super().__init__(Reason.CLOSED, "lost after our acceptance; not merged here")
        self.exchange_id = exchange_id


class Proposer:
    """Our links to partners with higher PeerIDs; each stays open, for one exchange at a time.

    Args:
        party: us.
        dialler: opens links.
        clock: monotonic, seconds.
    """

    def __init__(
        self, party: Party, dialler: Dialler, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._party = party
        self._dialler = dialler
        self._clock = clock
        self._links: dict[PeerId, Link] = {}
        self._used_s: dict[PeerId, float] = {}  # of each link: when an exchange last ended on it
        self._busy: set[PeerId] = set()

    async def propose(
        self,
        peer_id: PeerId,
        desk: ProposalHandler,
        *,
        slot: int,
        fragment: int,
        averaging: bool,
        form: Form,
        timeout_s: float,
    ) -> Agreement:
        """Ask a partner for an exchange. After an agreement, `done` must be called in any case.

        Raises:
            PeerError: the partner is unreachable, refuses, or is busy with us already.
        """
        if peer_id in self._busy:
            raise PeerError(Reason.BUSY, "an exchange with this partner is going on")
        self._drop_idle()
        self._busy.add(peer_id)
        try:
            async with asyncio.timeout(timeout_s):
                kept = self._kept(peer_id)
                link = kept or await self._dial(peer_id, timeout_s)
                ours = desk.terms(peer_id, slot)
                exchange_id = secrets.randbits(63)
                what = form.codec, form.num_values, averaging
                proposal = Propose(exchange_id, slot, fragment, *what, ours)
                try:
                    answer = await _ask(link, proposal)
                except PeerError as e:
                    if kept is None or isinstance(e, RefusedError) or e.reason not in _ENDED:
                        raise
                    link.abort()
                    link = await self._dial(peer_id, timeout_s)
                    answer = await _ask(link, proposal)  # unresolved exchanges are in terms once
                await _check_terms(link, desk, exchange_id, answer.terms)
        except RefusedError:
            self._busy.discard(peer_id)
            raise
        except TimeoutError as e:
            await self.done(peer_id, healthy=False)
            raise PeerError(Reason.TIMEOUT, "no answer to the proposal") from e
        except BaseException:
            await self.done(peer_id, healthy=False)
            raise
        return Agreement(
            link=link,
            exchange_id=exchange_id,
            slot=slot,
            fragment=fragment,
            averaging=averaging,
            form=form,
            ours=ours,
            theirs=answer.terms,
        )

    def busy_with(self, peer_id: PeerId) -> bool:
        """Whether we are in an exchange that we proposed to this partner."""
        return peer_id in self._busy

    async def done(self, peer_id: PeerId, *, healthy: bool) -> None:
        """End an exchange; drop the link unless it is healthy."""
        self._busy.discard(peer_id)
        self._used_s[peer_id] = self._clock()
        if not healthy and (link := self._links.pop(peer_id, None)) is not None:
            link.abort()

    async def close(self) -> None:
        """Close all links with their END frames."""
        links, self._links = list(self._links.values()), {}
        await asyncio.gather(*(link.close() for link in links))

    def _drop_idle(self) -> None:
        """Drop links that their partners soon close, and those to partners that are gone."""
        now_s = self._clock()
        for peer_id in self._links.keys() - self._busy:
            if now_s - self._used_s[peer_id] > KEPT_S:
                self._links.pop(peer_id).abort()
        self._used_s = {peer_id: self._used_s[peer_id] for peer_id in self._links}

    def _kept(self, peer_id: PeerId) -> Link | None:
        """The open link to a partner, if there is one.

        Raises:
            PeerError: NOT_A_MEMBER: its certificate has expired since.
        """
        link = self._links.get(peer_id)
        if link is None or link.closed:
            return None
        self._party.require(peer_id, "member")
        return link

    async def _dial(self, peer_id: PeerId, timeout_s: float) -> Link:
        link = await self._dialler.open_link(peer_id, PROTOCOL, timeout_s)
        try:
            handshake = self._party.handshake(peer_id, "exchange", initiator=True)
            await link.connect(handshake, initiator=True)
        except BaseException:
            link.abort()
            raise
        self._links[peer_id], self._used_s[peer_id] = link, self._clock()
        return link


async def _ask(link: Link, proposal: Propose) -> Agree:
    await link.send(proposal)
    return await link.expect(Agree, proposal.exchange_id, timeout_s=float("inf"))


async def _check_terms(link: Link, desk: ProposalHandler, exchange_id: int, theirs: Terms) -> None:
    """Have the desk check the partner's terms; tell the partner if they are refused."""
    try:
        desk.before_agreement(link.peer_id, theirs)
    except PeerError as e:
        await link.send(Refuse(exchange_id, e.reason))
        await link.ended()
        raise


def answering(party: Party, desk: ProposalHandler) -> Callable[[Link], Awaitable[None]]:
    """The handler of links that lower PeerIDs open to us.

    Args:
        party: us.
        desk: decides on proposals and runs the exchanges. It refuses forms that it does not expect.
    """

    async def handle(link: Link) -> None:
        try:
            handshake = party.handshake(link.peer_id, "exchange", initiator=False)
            await link.connect(handshake, initiator=False)
            check_rank(party.identity.peer_id, link.peer_id)
            while True:
                proposal = await link.receive(IDLE_TIMEOUT_S)
                if not isinstance(proposal, Propose):
                    raise PeerError(Reason.MALFORMED, "a proposal was due")
                party.require(link.peer_id, "member")
                await _answer(link, proposal)
                await asyncio.sleep(PROPOSAL_INTERVAL_S)
        finally:
            link.abort()

    async def _answer(link: Link, proposal: Propose) -> None:
        try:
            desk.before_agreement(link.peer_id, proposal.terms)
        except PeerError as e:  # refuse, keep the link: it may not know that it was restored
            reason: str | None = e.reason
        else:
            reason = desk.refusal_of(link.peer_id, proposal)
        if reason is not None:
            await link.send(Refuse(proposal.exchange_id, reason))
            return
        ours = desk.terms(link.peer_id, proposal.slot)
        await link.send(Agree(proposal.exchange_id, ours))
        await desk.take_part(
            Agreement(
                link=link,
                exchange_id=proposal.exchange_id,
                slot=proposal.slot,
                fragment=proposal.fragment,
                averaging=proposal.averaging,
                form=proposal.form,
                ours=ours,
                theirs=proposal.terms,
            )
        )

    return handle


def check_rank(me: PeerId, proposer: PeerId) -> None:
    """Check that the proposer has the lower PeerID: only that side opens exchange links.

    Raises:
        PeerError: it has the higher one.
    """
    if not proposer < me:
        raise PeerError(Reason.MALFORMED, "the higher PeerID does not propose")
