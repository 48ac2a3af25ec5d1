"""A link over a real socket: bulk in worker threads, its bounds, and everything that ends it."""

from __future__ import annotations

import asyncio
import gc
import os
import socket

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xpeer.errors import PeerError, Reason
from xpeer.identity import PeerId
from xpeer.network import bulk
from xpeer.network.link import Link, Meter
from xpeer.network.stream import Stream
from xpeer.wire.frames import FRAME_BYTES, Kind, Opener, Sealer
from xpeer.wire.messages import Accept, Payload
from xpeer.wire.session import Session

LARGE = 40 << 20
"""More than any socket buffer holds."""


def sessions() -> tuple[Session, Session]:
    return (
        Session(b"a" * 32, b"b" * 32, "aes-256-gcm"),
        Session(b"b" * 32, b"a" * 32, "aes-256-gcm"),
    )


def links(timeout_s: float = 5.0) -> tuple[Link, Link]:
    """Connected, past the handshake."""
    a, b = socket.socketpair()
    near = Link(PeerId("far"), Stream(a), timeout_s, Meter())
    far = Link(PeerId("near"), Stream(b), timeout_s, Meter())
    near._session, far._session = sessions()
    return near, far


@settings(max_examples=25)
@given(st.integers(0, 3 * FRAME_BYTES) | st.sampled_from([FRAME_BYTES, 2 * FRAME_BYTES]))
def test_bulk_arrives_whole_with_its_digest_and_is_counted(size):
    payload = os.urandom(size)

    async def run() -> None:
        near, far = links()
        digest, (received, same) = await asyncio.gather(
            near.send_bulk(payload), far.receive_bulk(size)
        )
        assert bytes(received) == payload
        assert digest == same
        assert near._meter.bytes_out == far._meter.bytes_in == bulk.sealed_size(size)
        await asyncio.gather(near.send(Accept(1, digest)), far.expect(Accept, 1))
        near.abort()
        far.abort()

    asyncio.run(run())


async def test_both_directions_at_once_and_messages_after_it():
    near, far = links()
    ours, theirs = os.urandom(3 << 20), os.urandom(5 << 20)
    results = await asyncio.gather(
        near.send_bulk(ours), near.receive_bulk(len(theirs)),
        far.send_bulk(theirs), far.receive_bulk(len(ours)),
    )  # fmt: skip
    assert (bytes(results[1][0]), bytes(results[3][0])) == (theirs, ours)
    await near.send(Payload(7, 1))
    assert await far.receive() == Payload(7, 1)
    await near.close()
    with pytest.raises(PeerError, match="ended the session"):
        await far.receive()
    far.abort()


async def test_the_event_loop_turns_while_a_payload_moves():
    near, far = links()
    payload = bytes(LARGE)
    moving = asyncio.gather(near.send_bulk(payload), far.receive_bulk(LARGE))
    turns = 0
    while not moving.done():
        await asyncio.sleep(0)
        turns += 1
    await moving
    assert turns > 10  # awaiting frame by frame would be 160 turns, blocking would be one or two
    near.abort()
    far.abort()


async def test_a_partner_that_does_not_read_stops_the_sender_within_its_memory():
    near, far = links(timeout_s=0.2)
    with pytest.raises(PeerError, match=Reason.TIMEOUT):
        await near.send_bulk(bytes(LARGE))
    near.abort()
    far.abort()


async def test_a_partner_that_stops_sending_is_noticed():
    near, far = links(timeout_s=0.2)
    with pytest.raises(PeerError, match=Reason.TIMEOUT):
        await near.receive_bulk(10)
    near.abort()
    far.abort()


@pytest.mark.parametrize("what", ["send", "receive"])
async def test_cancelling_frees_the_buffer_before_it_returns(what):
    near, far = links(timeout_s=60.0)
    work = near.send_bulk(bytes(LARGE)) if what == "send" else near.receive_bulk(LARGE)
    task = asyncio.ensure_future(work)
    while near._stream._users == 0:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert near._stream._sock.fileno() == -1  # closed, so no worker holds it
    far.abort()


async def test_an_abort_wakes_whoever_waits_and_leaves_no_descriptor():
    gc.collect()  # files of earlier tests
    before = psutil.Process().num_fds()
    near, far = links(timeout_s=60.0)
    waiting = [
        asyncio.ensure_future(near.receive(float("inf"))),
        asyncio.ensure_future(far.receive_bulk(100)),
    ]
    while not (near._stream._users and far._stream._users):
        await asyncio.sleep(0)
    near.abort()
    for outcome in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(outcome, PeerError)
        assert outcome.reason in (Reason.TRUNCATED, Reason.CLOSED)
    far.abort()
    assert psutil.Process().num_fds() == before
    with pytest.raises(PeerError, match=Reason.CLOSED):
        await near.send(Payload(1, 1))


@pytest.mark.parametrize(
    ("frames", "reason"),
    [
        ([(Kind.BULK, 11)], Reason.OVERSIZE),
        ([(Kind.BULK, 9)], Reason.MALFORMED),
        ([(Kind.MESSAGE, 10)], Reason.MALFORMED),
        ([(Kind.END, 0)], Reason.CLOSED),
        ([], Reason.TRUNCATED),
    ],
)
async def test_other_frames_than_announced_are_named(frames, reason):
    near, far = links()
    assert near._session is not None
    for kind, size in frames:
        await near._stream.write(near._session.sealer.seal(kind, bytes(size)))
    near.abort()
    with pytest.raises(PeerError) as caught:
        await far.receive_bulk(10)
    assert caught.value.reason == reason
    far.abort()


async def test_a_frame_of_the_wrong_size_that_does_not_open_is_tampered_with():
    near, far = links()
    await near._stream.write(Sealer(b"x" * 32, "aes-256-gcm").seal(Kind.BULK, bytes(9)))
    with pytest.raises(PeerError, match=Reason.TAMPERED):
        await far.receive_bulk(10)
    near.abort()
    far.abort()


@pytest.mark.parametrize("early", [0, 3, 300_000])
async def test_a_stream_is_taken_over_from_asyncio_with_what_it_had_read(early):
    """libp2p's streams come from asyncio, which may hold their first bytes already."""
    a, b = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=b, limit=1 << 20)
    data = os.urandom(400_000)
    near = Stream(a)
    sending = asyncio.ensure_future(near.write(data))
    while len(reader._buffer) < min(early, 100_000):  # type: ignore[attr-defined]
        await asyncio.sleep(0)
    far = await Stream.adopt(reader, writer)
    parts = [await far.read(1000)]
    rest = memoryview(bytearray(len(data) - 1000))
    await far.in_thread(lambda: far.fill(rest, 5.0))
    await sending
    assert parts[0] + bytes(rest) == data
    writer.close()  # as hivemind does when a handler returns: it is closed already
    for stream in (near, far):
        stream.shutdown()


async def test_a_stream_that_asyncio_closed_already_is_a_peer_error():
    a, b = socket.socketpair()
    reader, writer = await asyncio.open_connection(sock=b)
    writer.transport.abort()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    with pytest.raises(PeerError, match=Reason.CLOSED):
        await Stream.adopt(reader, writer)
    a.close()


def test_memory_is_taken_only_where_something_arrived():
    process = psutil.Process()
    before = process.memory_info().rss
    view = bulk.allocate(1 << 28)
    view[12345] = 1
    assert process.memory_info().rss - before < 1 << 26
    assert (len(view), view[12345], view[-1]) == (1 << 28, 1, 0)
    assert bulk.allocate(0).nbytes == 0


def test_the_digest_names_the_frames_and_their_order():
    """Two transfers of the same payload differ: no word about one fits the other."""
    opener, sealer = Opener(b"a" * 32, "aes-256-gcm"), Sealer(b"a" * 32, "aes-256-gcm")
    a, b = socket.socketpair()
    near, far = Stream(a), Stream(b)
    payload, digests = memoryview(os.urandom(70_000)), set()
    for _ in range(2):
        digest, out = bulk.send(near, sealer, payload, 5.0), bulk.allocate(70_000)
        assert bulk.receive(far, opener, out, 5.0) == digest
        assert out == payload
        digests.add(digest)
    assert len(digests) == 2
    near.shutdown()
    far.shutdown()
