"""Direct streams between real peers, and real links without them."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from tests.swarm.conftest import LOOPBACK, Founder, Launch
from xpeer.errors import ConfigError, PeerError
from xpeer.network.agreement import Party
from xpeer.network.link import Link
from xpeer.network.membership.keyring import KeyRing
from xpeer.network.swarm import Swarm
from xpeer.wire.messages import Accept, Payload

PROTOCOL = "xpeer/test-bulk/1"
SIZE = 24 << 20


def party(swarm: Swarm, founder: Founder) -> Party:
    return Party(
        swarm._identity, founder.swarm_id, KeyRing(b"k" * 32), b"m" * 32, 1, swarm.membership
    )


async def serve_bulk(swarm: Swarm, founder: Founder) -> None:
    """Take what partners send and acknowledge it."""

    async def take(link: Link) -> None:
        shake = party(swarm, founder).handshake(link.peer_id, "exchange", initiator=False)
        await link.connect(shake, initiator=False)
        while True:
            announced = await link.receive(30)
            assert isinstance(announced, Payload)
            _, digest = await link.receive_bulk(announced.num_bytes)
            await link.send(Accept(announced.exchange_id, digest))

    await swarm.serve_links(PROTOCOL, take, "member")


async def connected(swarm: Swarm, other: Swarm, founder: Founder) -> Link:
    link = await swarm.open_link(other.peer_id, PROTOCOL)
    shake = party(swarm, founder).handshake(other.peer_id, "exchange", initiator=True)
    await link.connect(shake, initiator=True)
    return link


async def send(link: Link, number: int) -> None:
    payload = os.urandom(1 << 20) * (SIZE >> 20)
    await link.send(Payload(number, SIZE))
    digest = await link.send_bulk(payload)
    assert await link.expect(Accept, number, 20) == Accept(number, digest)


@pytest.fixture
async def listener_and_caller(launch: Launch, founder: Founder, request) -> tuple[Swarm, Swarm]:
    """Two members; who of them listens for direct streams is the parameter."""
    listens: tuple[bool, bool] = request.param
    first = await launch(direct_listen=LOOPBACK if listens[0] else "")
    second = await launch(seeds=first.addresses, direct_listen=LOOPBACK if listens[1] else "")
    await asyncio.wait_for(second.bootstrapping.reached.wait(), 20)
    first.learn(second.addresses)
    second.learn(first.addresses)
    await serve_bulk(first, founder)
    return first, second


@pytest.mark.parametrize("listener_and_caller", [(True, False), (False, True)], indirect=True)
async def test_bulk_takes_the_direct_stream_whoever_listens(listener_and_caller, founder):
    first, second = listener_and_caller
    link = await connected(second, first, founder)
    assert link._second is not None
    assert await asyncio.wait_for(asyncio.shield(link._second), 15) is not None
    for number in range(3):
        await send(link, number)
    assert len(link._paths._bytes_per_s) == 2  # both streams were measured
    await link.close()


@pytest.mark.parametrize("listener_and_caller", [(False, False)], indirect=True)
async def test_without_a_direct_stream_bulk_takes_libp2ps(listener_and_caller, founder):
    first, second = listener_and_caller
    link = await connected(second, first, founder)
    await send(link, 1)
    assert link._second is not None
    assert await asyncio.wait_for(asyncio.shield(link._second), 15) is None
    assert SIZE < second.meter.bytes_out < SIZE + SIZE // 100
    await link.close()


@pytest.mark.parametrize("listener_and_caller", [(True, False)], indirect=True)
async def test_a_sidecar_that_dies_takes_the_link_and_the_next_one_works(
    listener_and_caller, founder
):
    first, second = listener_and_caller
    link = await connected(second, first, founder)
    await send(link, 1)
    restarts = second.sidecar_restarts
    os.kill(second._p2p._child.pid, signal.SIGKILL)
    with pytest.raises(PeerError):
        await asyncio.wait_for(link.receive(float("inf")), 10)
    link.abort()
    async with asyncio.timeout(30):
        while second.sidecar_restarts == restarts:
            await asyncio.sleep(0.05)
    again = await connected(second, first, founder)
    await send(again, 2)
    await again.close()


async def test_a_taken_port_stops_the_start_and_leaves_nothing(launch: Launch):
    first = await launch(direct_listen=LOOPBACK)
    taken = f"/ip4/127.0.0.1/tcp/{first.direct.port}"
    with pytest.raises(ConfigError, match=r"network\.direct_listen"):
        await launch(direct_listen=taken)
