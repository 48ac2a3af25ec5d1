"""A donor hands out its parameters in pieces; a joiner asks for those that it lacks.

    joiner  TreeRequest     donor  TreeOffer, then the hashes of all pieces as bulk
    joiner  PiecesRequest   donor  each of these pieces as bulk; and again, until the joiner ends

One snapshot serves all joiners for a while (`shelf`). What a joiner costs is bounded: a copy in the
trainer now and then, a place among `limits.max_transfers`, and twice a snapshot's bytes. A joiner
that reads or asks too slowly loses its place. Its snapshot stays for a while, and the joiner comes
back for what it lacks.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Final

from xpeer.errors import PeerError, Reason
from xpeer.identity import PeerId
from xpeer.network import bulk, pieces
from xpeer.network.agreement import Dialler, Party
from xpeer.network.link import Link
from xpeer.network.pieces import HASH_BYTES, Shape, Signer, Tree
from xpeer.network.rates import Pace, Rates
from xpeer.network.shelf import KEPT_S, PREPARE_TIMEOUT_S, Shelf, Snapshot, Source
from xpeer.network.turns import TURN_S, Spent, Turns
from xpeer.network.uplink import Uplink
from xpeer.wire.messages import (
    PIECE_BYTES,
    AnyMessage,
    PiecesRequest,
    TreeOffer,
    TreeRequest,
)

PROTOCOL: Final = "xpeer/state/2"
DIAL_TIMEOUT_S: Final = 30.0
BROKE: Final = frozenset({Reason.CLOSED, Reason.TRUNCATED, Reason.TIMEOUT})
"""Reasons that a broken link has. Any other is a fault of a peer."""
WORTH: Final = 0.05
"""Fraction of the model. A donor keeps the snapshot of a broken transfer only if at least this much
was sent, or if the joiner made way; less is sent e.g. to one that chose another donor."""
IDLE_S: Final = 60.0
"""A joiner that asks for nothing for so long loses its place. It may still compare offers. Once it
has begun, or links again for the same snapshot, it may take so long in all, over all its links, and
as long again as it was sent pieces. What a piece takes longer than at the least speed (`rates`) is
idle time, too: so half of that speed is the least.
"""


def serving(
    party: Party,
    source: Callable[[], Source | None],
    shape: Shape,
    turns: Turns,
    shelf: Shelf,
    uplink: Uplink,
) -> Callable[[Link], Awaitable[None]]:
    """The handler of links that joiners open to us.

    Args:
        party: us.
        source: returns the trainer, or None while there is nothing to give.
        shape: of the parameters, by the manifest.
        turns: decides whether a joiner gets anything now.
        shelf: keeps snapshots.
        uplink: bounds what we send to all joiners together.
    """

    async def handle(link: Link) -> None:
        try:
            shake = party.handshake(link.peer_id, "state", initiator=False)
            await link.connect(shake, initiator=False)
            request = await link.receive()
            if not isinstance(request, TreeRequest):
                raise PeerError(Reason.MALFORMED, "a tree request was due")
            trainer, root = source(), request.root
            if trainer is None:
                return  # the joiner sees a closed link and asks another member
            if root is not None and not shelf.holds(trainer, root):
                root = None
            comes_back = root is not None
            held = root is not None or shelf.is_fresh(trainer)
            if not await turns.may_begin(link.peer_id, held=held):
                return
            with turns.giving(link):
                taken = functools.partial(turns.bytes_of_late, link.peer_id)
                async with shelf.lend(trainer, root, end=link.abort, taken=taken) as lent:
                    gift = _Gift(party, link, shape, lent, turns, uplink)
                    await gift.give(shelf, comes_back=comes_back)
        finally:
            await link.close()

    return handle


class _Gift:
    """One link's donation.

    Args:
        party: us.
        link: to the joiner.
        shape: of the parameters.
        lent: the snapshot.
        turns: counts what this joiner is sent.
        uplink: bounds the speed.
    """

    def __init__(
        self,
        party: Party,
        link: Link,
        shape: Shape,
        lent: Snapshot,
        turns: Turns,
        uplink: Uplink,
    ) -> None:
        self._party, self._link, self._shape, self._lent = party, link, shape, lent
        self._turns, self._uplink = turns, uplink
        self._payload = memoryview(lent.state.payload)
        self._sent = 0
        """Bytes of pieces on this link."""

    async def give(self, shelf: Shelf, *, comes_back: bool) -> None:
        """Serve the joiner until it ends the link. If it breaks off, keep the snapshot.

        Args:
            shelf: keeps it.
            comes_back: the joiner asked for this snapshot, so it need not compare offers. Nor does
                one that had a link with it before.

        Raises:
            PeerError: the joiner was too slow, asked for too much, or its link broke.
        """
        if len(self._payload) != self._shape.num_bytes:
            raise PeerError(Reason.WRONG_MODEL, "the snapshot has another size")
        leaves = await self._lent.leaves()
        identity = self._party.identity
        offer = pieces.sign(_signer(self._party), identity, self._shape, self._lent.state, leaves)
        await self._link.send(offer)
        spent = self._turns.spent(self._link.peer_id, offer.root)
        comes_back = comes_back or spent.num_bytes > 0
        self._count(offer.root, len(leaves))
        await self._uplink.take(len(leaves))
        await self._send(memoryview(leaves))
        try:
            while True:
                request = await self._next(spent, counts=comes_back or self._sent > 0)
                await self._answer(request, offer.root, spent)
        except PeerError as e:
            made_way = self._turns.made_way(self._link.peer_id)
            if e.reason in BROKE and (made_way or self._sent >= WORTH * self._shape.num_bytes):
                for_s = KEPT_S + TURN_S if made_way else KEPT_S  # others have their turn first
                shelf.keep(self._lent, for_s, awaited=not self._link.partner_ended)
            raise

    async def _next(self, spent: Spent, *, counts: bool) -> AnyMessage:
        """The joiner's next request.

        Args:
            spent: gets the time that it takes.
            counts: the time counts, over all links with this snapshot: else who links again and
                again could keep it for ever.
        """
        left_s = _left_s(spent) if counts else IDLE_S
        began = time.monotonic()
        try:
            with self._turns.idle(self._link.peer_id):
                return await self._link.receive(left_s)
        finally:
            if counts:
                spent.idle_s += time.monotonic() - began

    async def _answer(self, request: AnyMessage, root: bytes, spent: Spent) -> None:
        if not isinstance(request, PiecesRequest):
            raise PeerError(Reason.MALFORMED, "a request for pieces was due")
        if request.first + request.count > self._shape.num_pieces:
            raise PeerError(Reason.MALFORMED, "pieces that do not exist")
        least = self._turns.rates.least(self._link.peer_id)
        for piece in range(request.first, request.first + request.count):
            _left_s(spent)
            size = self._shape.size(piece)
            self._count(root, size)
            await self._uplink.take(size)  # a bound of ours, so that time is not the joiner's
            began = time.monotonic()
            try:
                await self._send(self._payload[self._shape.place(piece)])
            except PeerError:  # it did not take what it asked for
                spent.idle_s += time.monotonic() - began
                raise
            spent.took(time.monotonic() - began, size / least)
            self._sent += size
            self._turns.sent_piece(self._link.peer_id, size)

    def _count(self, root: bytes, num_bytes: int) -> None:
        whole = self._shape.num_bytes + self._shape.num_pieces * HASH_BYTES
        self._turns.sent(self._link.peer_id, root, num_bytes, whole)

    async def _send(self, data: memoryview) -> None:
        pace = Pace(self._turns.rates.least(self._link.peer_id))
        await self._link.send_bulk(data, pace)


def _left_s(spent: Spent) -> float:
    """How long a joiner may still ask for nothing, or take its pieces too slowly.

    Raises:
        PeerError: it has done so for too long (TIMEOUT).
    """
    left_s = min(IDLE_S, IDLE_S + spent.busy_s - spent.idle_s)
    if left_s <= 0:
        raise PeerError(Reason.TIMEOUT, "this joiner takes nothing, or too little, for too long")
    return left_s


class Giver:
    """A donor that offered its parameters, as the joiner sees it. Made by `ask`.

    Attributes:
        tree: of its snapshot; signature and sizes are verified. Whether the parameters are good is
            not.
    """

    def __init__(self, link: Link, tree: Tree, shape: Shape, rates: Rates) -> None:
        self.tree = tree
        self._link, self._shape, self._rates = link, shape, rates
        self._buffer = memoryview(bytearray(PIECE_BYTES))

    @property
    def donor(self) -> PeerId:
        """The member."""
        return self.tree.donor

    @property
    def step(self) -> int:
        """The donor's steps, as it claims."""
        return self.tree.step

    @property
    def loss_public(self) -> float:
        """The donor's loss on the public text, as it claims; nats per token."""
        return self.tree.loss_public

    async def pieces(self, first: int, count: int) -> AsyncGenerator[tuple[int, memoryview]]:
        """Receive pieces in a row, each verified.

        They have a least speed together. Time in which the caller works on them does not count.

        Yields:
            The piece's number and its bytes, good until the next one is asked for.

        Raises:
            PeerError: the link broke, they came too slowly, or one is not the one that the donor
                signed.
        """
        await self._link.send(PiecesRequest(first, count))
        began, pace = time.monotonic(), Pace(self._rates.least(self.donor))
        try:
            for piece in range(first, first + count):
                data = self._buffer[: self._shape.size(piece)]
                await self._link.receive_into(data, pace)
                with pace.resting():
                    if not await asyncio.to_thread(self.tree.holds, piece, data):
                        detail = f"piece {piece} is not the one that the donor signed"
                        raise PeerError(Reason.DIGEST_MISMATCH, detail)
                    yield piece, data
        finally:
            self._rates.saw(self.donor, pace.moved, time.monotonic() - began)

    async def close(self) -> None:
        """End the link: we have what we wanted."""
        await self._link.close()

    def refuse(self) -> None:
        """Decline the offer, because another one is better."""
        self._link.abort()


async def ask(
    party: Party,
    dialler: Dialler,
    donor: PeerId,
    shape: Shape,
    rates: Rates,
    root: bytes | None = None,
) -> Giver:
    """Ask a member for its parameters, and check its tree.

    Args:
        party: us.
        dialler: opens the stream.
        donor: the member to ask.
        shape: of the parameters, by the manifest. Nothing of another size is read.
        rates: speeds of transfers so far.
        root: of this donor's tree under which we have pieces already. A donor that no longer holds
            that snapshot offers its present one.

    Raises:
        PeerError: the member is unreachable or busy, or its offer does not match.
    """
    link = await dialler.open_link(donor, PROTOCOL, DIAL_TIMEOUT_S)
    try:
        await link.connect(party.handshake(donor, "state", initiator=True), initiator=True)
        await link.send(TreeRequest(root))
        offer = await link.receive(PREPARE_TIMEOUT_S)
        if not isinstance(offer, TreeOffer):
            raise PeerError(Reason.MALFORMED, "a tree was due")
        pieces.check_offer(_signer(party), donor, offer, shape)
        leaves = bulk.allocate(shape.num_pieces * HASH_BYTES)
        await link.receive_into(leaves, Pace(rates.least(donor)))
        tree = pieces.verified(_signer(party), donor, offer, bytes(leaves), shape)
    except BaseException:
        link.abort()
        raise
    return Giver(link, tree, shape, rates)


def _signer(party: Party) -> Signer:
    return Signer(party.swarm_id, party.manifest_hash)
