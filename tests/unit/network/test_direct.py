"""Direct streams over loopback: found, chosen, broken, and knocked at by strangers."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.network.test_agreement import party
from xpeer.errors import ConfigError, PeerError, Reason
from xpeer.identity import Identity, PeerId
from xpeer.network import direct as direct_module
from xpeer.network.direct import MEASURED_BYTES, TRY_OTHER_EVERY, Direct, Offer, Paths
from xpeer.network.link import Link
from xpeer.network.stream import Stream
from xpeer.wire.frames import Kind
from xpeer.wire.session import Session

LOOPBACK = "/ip4/127.0.0.1/tcp/0"


async def on_loopback(peer_id: PeerId) -> list[str]:
    return ["127.0.0.1"]


async def nowhere(peer_id: PeerId) -> list[str]:
    return []


class Pair:
    """Two links with their directs, connected by a real handshake."""

    def __init__(self, low_hosts=on_loopback, high_hosts=on_loopback) -> None:
        self.low_id, self.high_id = Identity.generate(), Identity.generate()
        self.low_direct, self.high_direct = Direct(low_hosts), Direct(high_hosts)
        self.links: list[Link] = []

    async def connect(self) -> tuple[Link, Link]:
        a, b = socket.socketpair()
        low = Link(self.high_id.peer_id, Stream(a), 5.0, direct=self.low_direct)
        high = Link(self.low_id.peer_id, Stream(b), 5.0, direct=self.high_direct)
        self.links += [low, high]
        shake = party(self.low_id).handshake(self.high_id.peer_id, "exchange", initiator=True)
        answer = party(self.high_id).handshake(self.low_id.peer_id, "exchange", initiator=False)
        await asyncio.gather(
            low.connect(shake, initiator=True), high.connect(answer, initiator=False)
        )
        return low, high

    async def close(self) -> None:
        for link in self.links:
            link.abort()
        await self.low_direct.close()
        await self.high_direct.close()


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    gc.collect()  # files of earlier tests
    before = psutil.Process().num_fds()
    made = Pair()
    yield made
    await made.close()
    for _ in range(10):
        await asyncio.sleep(0)
    assert psutil.Process().num_fds() == before


async def second(link: Link) -> bool:
    """Whether it has a direct stream, once that is decided."""
    assert link._second is not None
    return await asyncio.wait_for(asyncio.shield(link._second), 10) is not None


async def swap(low: Link, high: Link, size: int = 1 << 20) -> None:
    ours, theirs = os.urandom(size), os.urandom(size)
    results = await asyncio.gather(
        low.send_bulk(ours), low.receive_bulk(size), high.send_bulk(theirs), high.receive_bulk(size)
    )
    assert (bytes(results[1][0]), bytes(results[3][0])) == (theirs, ours)


def direct_frames(link: Link) -> int:
    """Frames that were sealed for the direct stream, greeting included."""
    stream = link._second_if_open()
    assert stream is not None
    return stream[1].sealer._count


@pytest.mark.parametrize(("low", "high"), [(True, False), (False, True), (True, True)])
async def test_whoever_listens_both_ends_use_it(pair, low, high):
    for listens, direct in ((low, pair.low_direct), (high, pair.high_direct)):
        if listens:
            await direct.listen(LOOPBACK)
    ends = await pair.connect()
    assert await second(ends[0])
    assert await second(ends[1])
    await swap(*ends)
    assert direct_frames(ends[0]) > 1
    assert direct_frames(ends[1]) > 1


async def test_where_nobody_listens_bulk_takes_the_first_stream(pair):
    ends = await pair.connect()
    assert not await second(ends[0])
    await swap(*ends)


async def test_an_end_that_can_not_be_reached_costs_no_error(pair, monkeypatch):
    monkeypatch.setattr(direct_module, "TICKET_S", 0.05)
    await pair.high_direct.listen(LOOPBACK)
    pair.low_direct._hosts_of = nowhere
    ends = await pair.connect()
    assert not await second(ends[0])
    assert not await second(ends[1])
    assert not pair.high_direct._expected
    await swap(*ends)


async def test_bulk_may_come_before_our_own_end_is_ready(pair):
    await pair.high_direct.listen(LOOPBACK)
    low, high = await pair.connect()
    assert await second(high)
    await asyncio.gather(high.send_bulk(bytes(1000)), low.receive_bulk(1000))
    await asyncio.gather(low.send_bulk(bytes(10)), high.receive_bulk(10))


async def test_one_that_breaks_in_use_is_left_alone_for_a_while(pair):
    await pair.high_direct.listen(LOOPBACK)
    low, high = await pair.connect()
    assert await second(low)
    assert await second(high)
    stream = low._second_if_open()
    assert stream is not None
    stream[0].shutdown()
    with pytest.raises(PeerError, match=Reason.CLOSED):
        await low.send_bulk(bytes(1 << 20))
    assert low.closed
    high.abort()
    again = await pair.connect()
    assert not await second(again[0])
    await swap(*again)


async def test_bulk_announced_on_a_stream_that_is_not_there_is_malformed(pair):
    low, high = await pair.connect()
    assert low._session is not None
    await low._write(low._session.sealer.seal(Kind.ELSEWHERE, b""))
    with pytest.raises(PeerError, match=Reason.MALFORMED):
        await high.receive_bulk(10)


async def test_one_that_opens_at_the_other_end_alone_is_a_broken_link(pair, monkeypatch):
    """No fault of the other end: a joiner would forget what such a donor gave."""
    greet = direct_module._greet

    async def late(stream: Stream, session: Session, *, first: bool) -> None:
        await greet(stream, session, first=first)
        if first:
            stream.shutdown()
            raise PeerError(Reason.TIMEOUT, "no greeting on the direct stream")

    monkeypatch.setattr(direct_module, "_greet", late)
    await pair.high_direct.listen(LOOPBACK)
    low, high = await pair.connect()
    assert await second(high)
    sending = asyncio.create_task(high.send_bulk(bytes(1000)))
    with pytest.raises(PeerError, match=Reason.CLOSED):
        await low.receive_bulk(1000)
    await asyncio.gather(sending, return_exceptions=True)
    high.abort()
    again = await pair.connect()
    assert not await second(again[0])
    await swap(*again)


@pytest.mark.parametrize("said", [b"", b"short", b"x" * 16, b"x" * 100])
async def test_a_stranger_at_the_door_hears_nothing(pair, monkeypatch, said):
    monkeypatch.setattr(direct_module, "OPEN_TIMEOUT_S", 0.05)
    await pair.high_direct.listen(LOOPBACK)
    reader, writer = await asyncio.open_connection("127.0.0.1", pair.high_direct.port)
    writer.write(said)
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await asyncio.wait_for(reader.readexactly(1), 5)
    writer.close()
    assert pair.high_direct.strangers == 1


async def test_strangers_at_the_door_are_few_at_a_time_and_members_get_in_after_them(
    pair, monkeypatch
):
    monkeypatch.setattr(direct_module, "MAX_KNOCKING", 3)
    monkeypatch.setattr(direct_module, "OPEN_TIMEOUT_S", 0.2)
    await pair.high_direct.listen(LOOPBACK)
    strangers = [
        await asyncio.open_connection("127.0.0.1", pair.high_direct.port) for _ in range(10)
    ]
    for reader, writer in strangers:
        with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
            await asyncio.wait_for(reader.readexactly(1), 5)
        writer.close()
    assert pair.high_direct.strangers == 10
    monkeypatch.setattr(direct_module, "OPEN_TIMEOUT_S", 5.0)
    ends = await pair.connect()
    assert await second(ends[0])


async def test_a_stolen_ticket_opens_nothing(pair, monkeypatch):
    """Whoever shows it first and has no keys costs the pair this stream, and nothing else."""
    monkeypatch.setattr(direct_module, "OPEN_TIMEOUT_S", 0.3)
    await pair.high_direct.listen(LOOPBACK)
    stolen = asyncio.get_running_loop().create_future()

    async def steal(peer_id: PeerId) -> list[str]:
        ticket = next(iter(pair.high_direct._expected))
        reader, writer = await asyncio.open_connection("127.0.0.1", pair.high_direct.port)
        writer.write(ticket + b"\0" * 40)
        stolen.set_result((reader, writer))
        while ticket in pair.high_direct._expected:
            await asyncio.sleep(0)
        return ["127.0.0.1"]

    pair.low_direct._hosts_of = steal
    ends = await pair.connect()
    assert not await second(ends[0])
    assert not await second(ends[1])
    reader, writer = await stolen
    with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
        await asyncio.wait_for(reader.readexactly(1), 5)
    writer.close()
    await swap(*ends)


async def test_an_abort_while_it_is_being_opened_leaves_nothing(pair):
    await pair.high_direct.listen(LOOPBACK)
    await pair.connect()  # the fixture aborts at once, and counts descriptors


async def test_a_taken_port_is_the_operators_to_mend(pair):
    await pair.high_direct.listen(LOOPBACK)
    with pytest.raises(ConfigError, match=r"network\.direct_listen"):
        await pair.low_direct.listen(f"/ip4/127.0.0.1/tcp/{pair.high_direct.port}")
    with pytest.raises(ConfigError, match=r"network\.direct_listen"):
        await pair.low_direct.listen("127.0.0.1:4002")


@given(st.binary(max_size=60))
def test_garbage_for_an_offer_is_malformed(data):
    try:
        offer = Offer.from_bytes(data)
    except PeerError as e:
        assert e.reason == Reason.MALFORMED
    else:
        assert 0 <= offer.port <= 65535


def test_the_faster_stream_is_taken_and_the_other_tried_again():
    paths, large = Paths(), MEASURED_BYTES
    assert paths.choose(large)  # the direct one first
    paths.took(True, large, 1.0)
    assert not paths.choose(large)  # then the other, for comparison
    paths.took(False, large, 0.5)
    chosen = [paths.choose(large) for _ in range(3 * TRY_OTHER_EVERY)]
    assert sum(chosen) == 3
    paths.took(True, large, 0.1)
    assert paths.choose(large)
    paths.took(True, 1000, 1e9)  # too small to say anything
    assert paths.choose(1000)


async def test_tickets_of_links_that_never_opened_are_forgotten(monkeypatch: pytest.MonkeyPatch):
    """A member that greets and hangs up must not fill our memory."""
    monkeypatch.setattr(direct_module, "TICKET_S", 0.0)
    made = Pair()
    await made.high_direct.listen(LOOPBACK)
    for _ in range(50):
        a, b = socket.socketpair()
        high = Link(made.low_id.peer_id, Stream(b), 5.0, direct=made.high_direct)
        low = Link(made.high_id.peer_id, Stream(a), 5.0)
        shake = party(made.low_id).handshake(made.high_id.peer_id, "exchange", initiator=True)
        answer = party(made.high_id).handshake(made.low_id.peer_id, "exchange", initiator=False)

        async def greet(low: Link = low, shake: Any = shake) -> None:
            await low._write_hello(shake)
            await low._read_hello()
            low.abort()

        _, ended = await asyncio.gather(
            greet(), high.connect(answer, initiator=False), return_exceptions=True
        )
        assert isinstance(ended, PeerError)
        high.abort()
    voided = asyncio.Event()
    asyncio.get_running_loop().call_later(0.0, voided.set)  # after all that are due
    await voided.wait()
    assert not made.high_direct._expected
    await made.close()


async def test_a_stream_that_comes_before_our_end_waits_for_it_is_taken(pair):
    """The partner may present its ticket while we still read its offer."""
    await pair.high_direct.listen(LOOPBACK)
    direct, ours = pair.high_direct, pair.high_direct.offer(pair.low_id.peer_id)
    near, far = socket.create_connection(("127.0.0.1", ours.port)), None
    near.sendall(ours.ticket)
    while not direct._expected[ours.ticket].done():
        await asyncio.sleep(0)
    far = await direct._knock(ours.ticket)
    far.shutdown()
    near.close()
    direct._expected.clear()
