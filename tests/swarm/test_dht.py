"""The DHT's handlers and records among real nodes: who may store what, and who gets nothing."""

from __future__ import annotations

import asyncio

import pytest
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError, P2PHandlerError
from hivemind.utils import get_dht_time

from tests.swarm.conftest import Launch
from tests.swarm.test_joining import manifest_of
from tests.swarm.test_network import KEY, record, until
from xpeer.errors import Reason
from xpeer.identity import Identity
from xpeer.network import admission, agreement, giving
from xpeer.network.dht import MAX_RECORDS, MAX_TTL_S, MAX_VALUE_BYTES
from xpeer.network.membership.keyring import KeyRing
from xpeer.network.swarm import Swarm, _hivemind_id
from xpeer.roster.roster import Roster

DHT_HANDLERS = ("rpc_ping", "rpc_store", "rpc_find")


async def test_no_handler_of_hiveminds_parses_a_strangers_bytes(launch: Launch):
    member = await launch()
    stranger = await launch(role=None)
    await stranger._connect(member.peer_id, member.addresses)
    peer = _hivemind_id(member.peer_id)
    served = set(member._p2p._client.control.unary_handlers)
    for name in DHT_HANDLERS:
        before = member.strangers_refused
        handler = next(handler for handler in served if handler.endswith(name))
        # nonsense would be answered with "malformed", had anybody looked at it
        with pytest.raises(P2PHandlerError, match=Reason.NOT_A_MEMBER):
            await stranger._p2p._client.call_unary_handler(peer, handler, b"\xff\xff")
        assert member.strangers_refused == before + 1
    assert member.neighbours == 0


async def test_every_handler_that_is_registered_is_gated(launch: Launch):
    """Also one that somebody adds later: nothing but the introduction answers a stranger."""
    member = await launch()
    await admission.serve(member, manifest_of(Identity.generate()), KeyRing(KEY))
    stranger = await launch(role=None)
    await stranger._connect(member.peer_id, member.addresses)
    peer = _hivemind_id(member.peer_id)
    names = set(member._p2p._client.control.unary_handlers)
    assert len(names) == len(DHT_HANDLERS) + 2
    answered = set()
    for name in names:
        try:
            reply = await stranger._p2p._client.call_unary_handler(peer, name, b"")
        except P2PHandlerError as e:
            assert Reason.NOT_A_MEMBER in str(e)
            continue
        if reply != b"\x01" + Reason.NOT_A_MEMBER.encode():
            answered.add(name)
            assert reply == b"\x00"  # an empty answer: refused, and told nothing
    assert answered == {"xpeer/present/1"}
    with pytest.raises(PermissionError):
        await member._p2p.add_binary_stream_handler("ungated", None)


async def test_protocols_that_are_not_served_are_a_named_error(pair: tuple[Swarm, Swarm]):
    first, second = pair
    peer = _hivemind_id(first.peer_id)
    for name in (agreement.PROTOCOL, giving.PROTOCOL):
        with pytest.raises(P2PDaemonError):
            await second._p2p.call(peer, name, b"")


async def test_a_bad_request_of_a_member_costs_nothing(pair: tuple[Swarm, Swarm]):
    first, second = pair
    handler = next(h for h in first._p2p._client.control.unary_handlers if h.endswith("rpc_store"))
    with pytest.raises(P2PHandlerError, match=Reason.MALFORMED):
        await second._p2p._client.call_unary_handler(
            _hivemind_id(first.peer_id), handler, b"\xff\xff"
        )
    assert await Roster(second, KeyRing(KEY), 64).announce(record(second))


async def test_storage_is_bounded_and_nothing_is_cached(pair: tuple[Swarm, Swarm]):
    protocol: DHTProtocol = pair[0].dht.protocol
    assert protocol.storage.maxsize == MAX_RECORDS
    assert protocol.cache.maxsize == MAX_RECORDS


@pytest.mark.parametrize(
    ("ttl_s", "size", "fits"),
    [(MAX_TTL_S - 10, 100, True), (MAX_TTL_S + 10, 100, False), (30, MAX_VALUE_BYTES, False)],
)
async def test_bounds_of_a_record(pair: tuple[Swarm, Swarm], ttl_s: float, size: int, fits: bool):
    first, second = pair
    stored = await second.dht.store(
        "ab" * 32, bytes(size), get_dht_time() + ttl_s, subkey=second.peer_id
    )
    assert bool(stored) == fits
    found = await first.dht.get("ab" * 32, latest=True)
    assert bool(found) == fits


async def test_a_plain_value_without_an_owner_is_refused(pair: tuple[Swarm, Swarm]):
    first, second = pair
    peer, key = _hivemind_id(first.peer_id), DHTID.generate("key")
    stored = await second.dht.protocol.call_store(peer, [key], [b"plain"], get_dht_time() + 30)
    assert stored == [False]
    assert len(first.dht.protocol.storage) == 0


async def test_a_bootstrap_node_stores_what_it_can_not_read(launch: Launch):
    node = await launch(role=None)
    first, second = await launch(seeds=node.addresses), await launch(seeds=node.addresses)
    for member in (first, second):
        await asyncio.wait_for(member.bootstrapping.reached.wait(), 20)
        assert await Roster(member, KeyRing(KEY), 16).announce(record(member))
    await until(lambda: len(node.dht.protocol.storage) > 0)
    [(_, (shard, _))] = node.dht.protocol.storage.items()
    owners = {owner: stored.value for owner, stored in shard.items()}
    assert set(owners) == {first.peer_id, second.peer_id}
    kept = b"".join(owners.values())
    assert first.addresses[0].encode() not in kept
    assert b"training" not in kept
    assert node.dht.protocol.record_validator.rejected == 0
