"""The gate, the sidecar's deaths, and what a stranger gets: nothing."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
from hivemind.p2p import PeerID
from hivemind.utils import get_dht_time

from tests.swarm.conftest import Founder
from xpeer.errors import ConfigError, PeerError, Reason
from xpeer.network.link import Link
from xpeer.network.membership.keyring import KeyRing
from xpeer.network.swarm import Swarm
from xpeer.roster.roster import TTL_S, MemberRecord, Roster

KEY = b"k" * 32
ECHO = "xpeer/test-echo/1"


async def echo(peer_id: str, request: bytes) -> bytes:
    return request


def record(swarm: Swarm, phase: str = "training") -> MemberRecord:
    return MemberRecord(swarm.peer_id, swarm.addresses, "member", phase, 1.0, 1)


async def until(condition, timeout_s: float = 20.0) -> None:
    """Poll what has no event to wait for."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.02)


async def test_members_call_and_stream(pair):
    first, second = pair
    await first.serve_call(ECHO, echo, "member", 1000)
    heard = asyncio.get_running_loop().create_future()

    async def listen(link: Link) -> None:
        heard.set_result(await link._read(5))

    await first.serve_links("xpeer/test-stream/1", listen, "member")
    assert await second.call(first.peer_id, ECHO, b"hello") == b"hello"
    link = await second.open_link(first.peer_id, "xpeer/test-stream/1")
    await link._write(b"bytes")
    assert await asyncio.wait_for(heard, 5) == b"bytes"
    link.abort()


async def test_a_stranger_reads_stores_and_calls_nothing(launch, founder):
    member = await launch()
    await member.serve_call(ECHO, echo, "member", 1000)
    touched = asyncio.Event()

    async def listen(link: Link) -> None:
        touched.set()

    await member.serve_links("xpeer/test-stream/1", listen, "member")
    assert await Roster(member, KeyRing(KEY), 64).announce(record(member))

    stranger = await launch(seeds=member.addresses, role=None)  # dials, and has no credential
    await until(lambda: stranger.bootstrap_note)
    assert not stranger.bootstrapping.reached.is_set()
    assert await stranger.dht.protocol.call_ping(PeerID.from_base58(member.peer_id)) is None
    for call in (
        stranger.call(member.peer_id, ECHO, b"x"),
        stranger.call(member.peer_id, "xpeer/admit/1", b""),
    ):
        with pytest.raises(PeerError):
            await call
    link = await stranger.open_link(member.peer_id, "xpeer/test-stream/1")
    with pytest.raises(PeerError, match=Reason.TRUNCATED):
        await link._read(100)
    link.abort()
    roster = Roster(stranger, KeyRing(KEY), 64)  # even with the key, it gets no record to open
    await roster.refresh()
    assert roster.members() == {}
    found = await stranger.dht.protocol.call_store(
        PeerID.from_base58(member.peer_id), [stranger.dht.node_id], [b"v"], get_dht_time() + 30
    )
    assert found is None
    assert len(member.dht.protocol.storage) == 1
    assert not touched.is_set()
    assert member.strangers_refused >= 4
    assert stranger.dht.node_id not in member.dht.protocol.routing_table


async def test_a_member_of_another_swarm_is_a_stranger(launch):
    member = await launch()
    await member.serve_call(ECHO, echo, "member", 1000)
    other = await launch(seeds=member.addresses, of=Founder())
    with pytest.raises(PeerError, match=Reason.NOT_A_MEMBER):
        await other.call(member.peer_id, ECHO, b"x")


async def test_infrastructure_takes_part_in_the_dht_and_in_nothing_else(launch):
    member = await launch()
    await member.serve_call(ECHO, echo, "member", 1000)
    helper = await launch(seeds=member.addresses, role="infrastructure")
    await asyncio.wait_for(helper.bootstrapping.reached.wait(), 20)
    with pytest.raises(PeerError, match=Reason.NOT_A_MEMBER):
        await helper.call(member.peer_id, ECHO, b"x")


async def test_a_reply_that_is_too_large_is_a_named_error(pair):
    first, second = pair

    async def huge(peer_id: str, request: bytes) -> bytes:
        return bytes(3 << 20)

    await first.serve_call(ECHO, huge, "member", 1000)
    with pytest.raises(PeerError, match=Reason.OVERSIZE):
        await second.call(first.peer_id, ECHO, b"")


async def test_a_request_that_is_too_large_is_refused(pair):
    first, second = pair
    await first.serve_call(ECHO, echo, "member", 10)
    with pytest.raises(PeerError, match=Reason.OVERSIZE):
        await second.call(first.peer_id, ECHO, b"x" * 11)


async def test_an_unreachable_peer_is_a_named_error(pair):
    first, second = pair
    await first.close()
    with pytest.raises(PeerError):
        await second.call(first.peer_id, ECHO, b"x")


async def test_our_sidecar_dies_calls_fail_at_once_and_it_comes_back(pair):
    first, second = pair
    entered = asyncio.Event()

    async def never(peer_id: str, request: bytes) -> bytes:
        entered.set()
        await asyncio.Event().wait()
        return b""

    await first.serve_call("xpeer/test-never/1", never, "member", 10)
    await first.serve_call(ECHO, echo, "member", 10)
    call = asyncio.create_task(second.call(first.peer_id, "xpeer/test-never/1", b"", 30))
    await asyncio.wait_for(entered.wait(), 10)
    before = second.peer_id
    os.kill(second._p2p._child.pid, signal.SIGKILL)
    with pytest.raises(PeerError, match=Reason.SIDECAR_DOWN):
        await asyncio.wait_for(call, 5)
    await until(lambda: second.sidecar_restarts == 1)
    assert second._p2p.peer_id.to_base58() == before
    assert await second.call(first.peer_id, ECHO, b"again") == b"again"


async def test_the_other_sidecar_dies_and_the_call_is_a_named_error(pair):
    first, second = pair
    entered = asyncio.Event()

    async def never(peer_id: str, request: bytes) -> bytes:
        entered.set()
        await asyncio.Event().wait()
        return b""

    await first.serve_call("xpeer/test-never/1", never, "member", 10)
    call = asyncio.create_task(second.call(first.peer_id, "xpeer/test-never/1", b"", 30))
    await asyncio.wait_for(entered.wait(), 10)
    os.kill(first._p2p._child.pid, signal.SIGKILL)
    with pytest.raises(PeerError, match=Reason.UNREACHABLE):
        await asyncio.wait_for(call, 10)


async def test_a_seed_may_come_up_late(launch):
    first = await launch()
    identity, address = first._identity, first.addresses[0]
    await first.close()
    second = await launch(seeds=[address])
    await until(lambda: second.bootstrap_note)
    assert "no seed answers" in second.bootstrap_note
    await launch(identity=identity, listen=address.rpartition("/p2p/")[0])
    await asyncio.wait_for(second.bootstrapping.reached.wait(), 30)
    assert second.bootstrap_note == ""


async def test_members_find_one_another_and_go_on_when_the_seed_is_gone(launch):
    seed = await launch(role=None)  # a bootstrap node: no credential, no swarm key
    first = await launch(seeds=seed.addresses)
    second = await launch(seeds=seed.addresses)
    for swarm in (first, second):
        await asyncio.wait_for(swarm.bootstrapping.reached.wait(), 20)
    rosters = [Roster(first, KeyRing(KEY), 64), Roster(second, KeyRing(KEY), 64)]
    for swarm, roster in zip((first, second), rosters, strict=True):
        assert await roster.announce(record(swarm))
    for roster in rosters:
        await roster.refresh()
        assert set(roster.members()) == {first.peer_id, second.peer_id}
    await first.serve_call(ECHO, echo, "member", 10)
    await seed.close()
    assert await second.call(first.peer_id, ECHO, b"x") == b"x"
    assert await rosters[0].announce(record(first, "closing"))
    fresh = Roster(second, KeyRing(KEY), 64)  # the other has read the DHT a moment ago
    await fresh.refresh()
    assert fresh.members()[first.peer_id].phase == "closing"


async def test_roster_records_are_unreadable_without_the_key_and_expire(pair):
    first, second = pair
    await Roster(first, KeyRing(KEY), 64).announce(record(first))
    other = Roster(second, KeyRing(KEY), 64)
    other._shards._keyring = KeyRing(b"x" * 32)
    await other.refresh()
    assert other.members() == {}
    passed_s = 0.0
    mine = Roster(second, KeyRing(KEY), 64, lambda: get_dht_time() + passed_s)
    await mine.refresh()
    assert set(mine.members()) == {first.peer_id}
    passed_s = TTL_S
    assert mine.members() == {}


async def test_members_that_serve_their_rosters_need_no_dht(pair, monkeypatch):
    first, second = pair
    rosters = [Roster(first, KeyRing(KEY), 64), Roster(second, KeyRing(KEY), 64)]

    async def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError

    for swarm, roster in zip(pair, rosters, strict=True):
        monkeypatch.setattr(swarm.dht, "store", unreachable)
        monkeypatch.setattr(swarm.dht, "get_many", unreachable)
        await roster.serve()
        await roster.announce(record(swarm))
    await rosters[1].refresh()
    for roster in rosters:
        assert set(roster.members()) == {first.peer_id, second.peer_id}
    assert not await rosters[0].announce(record(first, "closing"))
    assert rosters[1].members()[first.peer_id].phase == "closing"


async def test_nobody_stores_for_another_or_for_too_long(pair):
    first, second = pair
    key = "ab" * 32
    stored = await second.dht.store(key, b"v", get_dht_time() + 30, subkey=first.peer_id)
    assert not stored
    assert not await second.dht.store(key, b"v", get_dht_time() + 9999, subkey=second.peer_id)
    assert not await second.dht.store(key, b"v" * 9999, get_dht_time() + 30, subkey=second.peer_id)
    assert await second.dht.store(key, b"v", get_dht_time() + 30, subkey=second.peer_id)


@pytest.mark.parametrize(
    ("listen", "problem"),
    [
        ("/ip4/127.0.0.1/udp/1/quic", "network.listen"),
        ("nonsense", "network.listen"),
        ("/ip4/127.0.0.1/tcp/99999", "network.listen"),
    ],
)
async def test_bad_addresses_are_named(launch, listen, problem):
    with pytest.raises(ConfigError, match=problem):
        await launch(listen=listen)


async def test_a_taken_port_and_a_seed_without_peer_id_are_named(launch):
    first = await launch()
    with pytest.raises(ConfigError, match="can't listen"):
        await launch(listen=first.addresses[0].rpartition("/p2p/")[0])
    with pytest.raises(ConfigError, match="does not end in /p2p/PEERID"):
        await launch(seeds=["/ip4/127.0.0.1/tcp/4001"])


async def test_close_leaves_no_process_and_no_socket_behind(launch):
    swarm = await launch()
    folder, pid = swarm._p2p._scratch.path, swarm._p2p._child.pid
    assert folder.stat().st_mode & 0o777 == 0o700
    await swarm.close()
    assert not folder.exists()
    assert not Path(f"/proc/{pid}").exists()
