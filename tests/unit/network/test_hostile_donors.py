"""Donors that offer or send other than they should: each costs its own link, and little time."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import pytest

from tests.unit.network.test_agreement import party
from tests.unit.network.test_giving import (
    LEAVES,
    OFFER,
    PAYLOAD,
    SHAPE,
    SIGNER,
    received,
    signed,
)
from xpeer.errors import PeerError, Reason
from xpeer.identity import Identity, PeerId
from xpeer.network import giving
from xpeer.network.giving import Giver
from xpeer.network.link import Link
from xpeer.network.pieces import verified
from xpeer.network.rates import Pace, Rates
from xpeer.network.stream import Stream
from xpeer.wire.frames import FRAME_BYTES, Kind
from xpeer.wire.messages import PIECE_BYTES, PiecesRequest, TreeRequest

FRAME_S = 0.3
"""A frame's deadline; 15 s in production."""
SMALL_FRAMES = 5000
TRICKLE_EVERY_S = 0.01

Attack = Callable[[Identity, Link], Awaitable[None]]


class Hostile:
    """A member that does everything right until a joiner has asked for its tree."""

    def __init__(self) -> None:
        self.identity, self.joiner = Identity.generate(), Identity.generate()
        self.attack: Attack = offer_only
        self.frame_s = FRAME_S
        self._tasks: list[asyncio.Task[None]] = []

    async def open_link(self, peer_id: PeerId, protocol: str, timeout_s: float) -> Link:
        ours, theirs = socket.socketpair()
        self._tasks.append(asyncio.create_task(self._serve(Stream(theirs))))
        return Link(self.identity.peer_id, Stream(ours), self.frame_s)

    async def _serve(self, stream: Stream) -> None:
        link, joiner = Link(self.joiner.peer_id, stream, 60.0), self.joiner.peer_id
        with contextlib.suppress(PeerError):
            await link.connect(
                party(self.identity).handshake(joiner, "state", initiator=False), initiator=False
            )
            await link.receive()
            await self.attack(self.identity, link)
            await link.receive(60.0)  # until the joiner drops the link
        link.abort()

    async def ask(self) -> Giver:
        return await giving.ask(
            party(self.joiner), self, self.identity.peer_id, SHAPE, Rates(), None
        )

    async def end(self) -> None:
        """Returns only if the joiner has dropped every link."""
        async with asyncio.timeout(20):
            await asyncio.gather(*self._tasks)


@pytest.fixture
async def hostile() -> AsyncIterator[Hostile]:
    made = Hostile()
    yield made
    await made.end()


async def offer_only(donor: Identity, link: Link) -> None:
    await link.send(signed(donor, OFFER))
    await link.send_bulk(LEAVES)


async def say_nothing(donor: Identity, link: Link) -> None:
    pass


async def say_something_else(donor: Identity, link: Link) -> None:
    await link.send(TreeRequest())


async def offer_without_hashes(donor: Identity, link: Link) -> None:
    await link.send(signed(donor, OFFER))


async def offer_too_few_hashes(donor: Identity, link: Link) -> None:
    await link.send(signed(donor, OFFER))
    await link.send_bulk(LEAVES[:-32])


async def offer_too_many_hashes(donor: Identity, link: Link) -> None:
    await link.send(signed(donor, OFFER))
    await link.send_bulk(LEAVES + bytes(32))


async def offer_hashes_of_something_else(donor: Identity, link: Link) -> None:
    await link.send(signed(donor, OFFER))
    await link.send_bulk(LEAVES[32:] + LEAVES[:32])


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        (say_nothing, Reason.TIMEOUT),
        (say_something_else, Reason.MALFORMED),
        (offer_without_hashes, Reason.TIMEOUT),
        (offer_too_few_hashes, Reason.MALFORMED),
        (offer_too_many_hashes, Reason.OVERSIZE),
        (offer_hashes_of_something_else, Reason.DIGEST_MISMATCH),
    ],
)
async def test_offers(
    hostile: Hostile, monkeypatch: pytest.MonkeyPatch, attack: Attack, reason: str
) -> None:
    if reason == Reason.TIMEOUT:
        monkeypatch.setattr(giving, "PREPARE_TIMEOUT_S", FRAME_S)
    hostile.attack = attack
    hostile.frame_s = FRAME_S if reason == Reason.TIMEOUT else 60.0
    with pytest.raises(PeerError) as error:
        await hostile.ask()
    assert error.value.reason == reason


async def give_nothing(donor: Identity, link: Link) -> None:
    pass


async def give_another_piece(donor: Identity, link: Link) -> None:
    await link.send_bulk(PAYLOAD[PIECE_BYTES : 2 * PIECE_BYTES])


async def give_too_little(donor: Identity, link: Link) -> None:
    await link.send_bulk(PAYLOAD[:1000])


async def give_small_frames(donor: Identity, link: Link) -> None:
    sealer = link._open_session().sealer
    for _ in range(SMALL_FRAMES):
        await link._stream.write(sealer.seal(Kind.BULK, b"x"))


async def give_a_message(donor: Identity, link: Link) -> None:
    await link.send(TreeRequest())


async def give_a_byte_now_and_then(donor: Identity, link: Link) -> None:
    """Of a frame that is right."""
    frame = link._open_session().sealer.seal(Kind.BULK, PAYLOAD[: 1 << 18])
    for start in range(len(frame)):
        await link._stream.write(frame[start : start + 1])
        await asyncio.sleep(TRICKLE_EVERY_S)


@pytest.mark.parametrize(
    ("attack", "reason"),
    [
        (give_nothing, Reason.TIMEOUT),
        (give_another_piece, Reason.DIGEST_MISMATCH),
        (give_too_little, Reason.MALFORMED),
        (give_small_frames, Reason.MALFORMED),
        (give_a_message, Reason.MALFORMED),
        (give_a_byte_now_and_then, Reason.TIMEOUT),
    ],
)
async def test_pieces(hostile: Hostile, attack: Attack, reason: str) -> None:
    async def offer_and_attack(donor: Identity, link: Link) -> None:
        await offer_only(donor, link)
        await link.receive(60.0)
        await attack(donor, link)

    hostile.attack = offer_and_attack
    hostile.frame_s = FRAME_S if reason == Reason.TIMEOUT else 60.0
    giver = await hostile.ask()
    with pytest.raises(PeerError) as error:
        await received(giver, 0, 1)
    assert error.value.reason == reason
    giver.refuse()


async def test_more_than_the_last_piece_holds(hostile: Hostile) -> None:
    async def offer_and_send_more(donor: Identity, link: Link) -> None:
        await offer_only(donor, link)
        await link.receive(60.0)
        await link.send_bulk(bytes(PIECE_BYTES))

    hostile.attack, hostile.frame_s = offer_and_send_more, 60.0
    giver = await hostile.ask()
    with pytest.raises(PeerError, match=Reason.OVERSIZE):
        await received(giver, SHAPE.num_pieces - 1, 1)
    giver.refuse()


class Trickle:
    """A link on which each frame comes after so many seconds, by the clock of a test."""

    def __init__(self, frame_s: float) -> None:
        self.now_s, self._frame_s, self._next = 0.0, frame_s, 0

    async def send(self, message: PiecesRequest) -> None:
        self._next = message.first * PIECE_BYTES

    async def receive_into(self, payload: memoryview, pace: Pace) -> None:
        for start in range(0, len(payload), FRAME_BYTES):
            part = payload[start : start + FRAME_BYTES]
            pace.allows_s(len(part))
            self.now_s += self._frame_s
            part[:] = PAYLOAD[self._next : self._next + len(part)]
            self._next += len(part)
            pace.moved += len(part)


@pytest.mark.parametrize(("frame_s", "pieces"), [(11.0, 1), (3.0, 4)])
async def test_pieces_of_a_row_have_a_least_speed_together(
    monkeypatch: pytest.MonkeyPatch, frame_s: float, pieces: int
) -> None:
    """With 30 s more for each of them a third of that speed would do."""
    link, donor = Trickle(frame_s), Identity.generate()
    monkeypatch.setattr(giving, "Pace", lambda least: Pace(least, lambda: link.now_s))
    tree = verified(SIGNER, donor.peer_id, signed(donor, OFFER), LEAVES, SHAPE)
    giver = Giver(cast(Any, link), tree, SHAPE, Rates())
    came = 0
    with contextlib.suppress(PeerError):
        async for _ in giver.pieces(0, 4):
            came += 1
            link.now_s += 1000.0  # the joiner's own disk is slow
    assert came == pieces
