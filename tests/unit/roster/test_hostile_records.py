"""What other nodes of the DHT, and callers who are nobody, may do to us: nothing."""

from __future__ import annotations

import asyncio
import math
import time
from types import SimpleNamespace
from typing import Any, cast

import base58
import msgspec
import pytest
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue
from hivemind.dht.validation import DHTRecord
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2
from hivemind.utils import get_dht_time
from hivemind.utils.timed_storage import ValueWithExpiration

from xpeer.errors import PeerError, Reason, known_reason
from xpeer.identity import Identity
from xpeer.manifest.signed import Genesis
from xpeer.network import introductions
from xpeer.network.addresses import MAX_PEERS, AddressBook, is_dialled
from xpeer.network.dht import MAX_KEYS_OF_OWNER, OwnerSigned, harden, keep_valid, ping
from xpeer.network.membership.certificates import Credential, Membership
from xpeer.network.membership.invites import grant
from xpeer.network.p2p import _Handling, _Waiting

ADMIN = Identity.generate()
GENESIS = Genesis(ADMIN.verify_key, b"h" * 32)
KEY = DHTID.generate("roster").to_bytes()


def credential(identity: Identity, role: str = "member", age_s: float = 0.0) -> Credential:
    certificate = grant(
        GENESIS, identity.peer_id, cast(Any, role), 3600, int(time.time()) - int(age_s)
    )
    return Credential.issue(ADMIN, certificate, identity.peer_id)


def record(
    identity: Identity, *, key: bytes = KEY, ttl_s: float = 30.0, payload: bytes = b"\xc4\x01v"
) -> DHTRecord:
    owner = OwnerSigned(Membership(GENESIS.swarm_id, credential(identity)), identity)
    subkey = msgspec.msgpack.encode(identity.peer_id)
    unsigned = DHTRecord(key, subkey, payload, get_dht_time() + ttl_s)
    return DHTRecord(key, subkey, owner.sign_value(unsigned), unsigned.expiration_time)


@pytest.fixture
def validator() -> OwnerSigned:
    return OwnerSigned(Membership(GENESIS.swarm_id, None), None)


def test_a_payload_that_hivemind_can_not_decode_is_no_record(validator):
    assert validator.validate(record(Identity.generate()))
    for payload in (b"\xc1", b"", b"\xc4\xff", b"\xa1v", b"\xc8\xff\xff\x50"):
        assert not validator.validate(record(Identity.generate(), payload=payload))


@pytest.mark.parametrize("value", [None, 1, "text", [b"v"], {}, b"\xc1", b"\x80" * 5000])
def test_nonsense_is_no_record_and_raises_nothing(validator, value):
    good = record(Identity.generate())
    assert not validator.validate(DHTRecord(KEY, good.subkey, value, good.expiration_time))
    for expiration in (math.nan, math.inf, 1e300, "soon", None, b""):
        assert not validator.validate(DHTRecord(KEY, good.subkey, good.value, expiration))
    for subkey in (b"", b"\xc1", b"\x01", msgspec.msgpack.encode("12D3KooW")):
        assert not validator.validate(DHTRecord(KEY, subkey, good.value, good.expiration_time))


def test_an_earlier_record_that_is_stored_again_does_not_take_the_later_one_along(validator):
    """In hivemind's storage it would: the later one would vanish when the earlier one ends."""
    me = Identity.generate()
    earlier, later = record(me, ttl_s=5), record(me, ttl_s=30)
    assert validator.validate(earlier)
    assert validator.validate(later)
    assert validator.validate(later)
    assert not validator.validate(earlier)
    storage = DHTLocalStorage()  # what would happen
    key = DHTID.generate("k")
    storage.store_subkey(key, "owner", b"later", get_dht_time() + 30)
    storage.store_subkey(key, "owner", b"earlier", get_dht_time() + 5)
    inner = storage.get(key).value
    assert inner.key_to_heap["owner"].expiration_time < get_dht_time() + 6


def test_one_owner_can_not_fill_the_storage(validator):
    me = Identity.generate()
    keys = [DHTID.generate(str(n)).to_bytes() for n in range(MAX_KEYS_OF_OWNER + 3)]
    stored = [validator.validate(record(me, key=key)) for key in keys]
    assert sum(stored) == MAX_KEYS_OF_OWNER
    assert validator.validate(record(me, key=keys[0], ttl_s=60))
    assert validator.validate(record(Identity.generate(), key=keys[-1]))


def test_one_bad_record_does_not_hide_the_others(validator):
    good, bad, late = (record(Identity.generate()) for _ in range(3))
    records = DictionaryDHTValue()
    records.maxsize = cast(Any, "many")
    owners = [msgspec.msgpack.decode(r.subkey) for r in (good, bad, late)]
    with records.freeze():
        records.store(owners[0], good.value, good.expiration_time)
        records.store(owners[1], good.value, bad.expiration_time)
        records.store(owners[2], late.value, get_dht_time() + 1e6)
        records.store(b"no name", good.value, good.expiration_time + 1)
        records.store(owners[2] + "x", cast(Any, 7), good.expiration_time + 2)
    assert keep_valid(validator, KEY, records)
    assert list(records.data) == owners[:1]
    assert len(records) == 1  # maxsize is a number again


async def test_a_node_that_answers_with_lies_ends_nobodys_search(validator):
    empty, full = DictionaryDHTValue(), DictionaryDHTValue()
    full.store("owner", b"v", get_dht_time() + 30)
    nearest = {DHTID.generate(str(n)): n for n in range(1000)}
    answer = {
        DHTID.generate("a"): (ValueWithExpiration(empty, math.inf), nearest),
        DHTID.generate("b"): (ValueWithExpiration(full, math.inf), {}),
        DHTID.generate("c"): (ValueWithExpiration(b"plain", math.inf), {}),
        DHTID.generate("d"): (None, {}),
    }

    async def find(peer: object, keys: object) -> object:
        return answer

    protocol = cast(DHTProtocol, SimpleNamespace(call_find=find, bucket_size=20))
    harden(protocol, validator)
    found = await protocol.call_find(cast(Any, None), list(answer))
    values = [item for item, _ in found.values()]
    assert values[0] is values[2] is values[3] is None
    assert values[1].expiration_time < get_dht_time() + 31
    assert max(len(near) for _, near in found.values()) == 20


@pytest.mark.parametrize(
    "answer",
    [
        dht_pb2.PingResponse(peer=dht_pb2.NodeInfo(node_id=b"\xff" * 21)).SerializeToString(),
        dht_pb2.PingResponse(peer=dht_pb2.NodeInfo(node_id=bytes(20))).SerializeToString(),
        dht_pb2.PingResponse(available=True).SerializeToString(),
        b"\xff\xff",
        b"",
    ],
    ids=["21-bytes", "another", "no-node", "no-protobuf", "empty"],
)
async def test_a_peer_that_answers_a_ping_with_nonsense_fails_alone(answer):
    """Its error is one of the peer: any other would end the dials of all."""
    peer, known = PeerID.from_base58(Identity.generate().peer_id), []

    async def rpc_ping(request: object, timeout: float) -> object:
        return dht_pb2.PingResponse.FromString(answer)

    async def update(node_id: object, peer_id: object, responded: bool) -> None:
        known.append((node_id, responded))

    protocol = SimpleNamespace(
        node_info=dht_pb2.NodeInfo(node_id=bytes(20)),
        wait_timeout=1.0,
        get_stub=lambda peer: SimpleNamespace(rpc_ping=rpc_ping),
        update_routing_table=update,
    )
    with pytest.raises(PeerError, match=Reason.MALFORMED):
        await ping(cast(Any, SimpleNamespace(protocol=protocol)), peer)
    assert known == [(None, False)]


def test_somebody_elses_record_teaches_nothing_about_a_peer(validator):
    me = Identity.generate()
    membership = validator._membership
    membership.admit(me.peer_id, credential(me).to_bytes())
    old = credential(me, "observer", age_s=100)
    forged = msgspec.msgpack.encode([b"\xc4\x01v", old.to_bytes(), bytes(64)])
    subkey = msgspec.msgpack.encode(me.peer_id)
    assert not validator.validate(DHTRecord(KEY, subkey, forged, get_dht_time() + 30))
    membership.admit(me.peer_id, old.to_bytes())  # nor does a replay of what it once was
    assert membership.allows(me.peer_id, "member")


def test_strangers_can_not_use_up_the_introductions_of_members():
    limit = introductions.RateLimit()
    stranger, member = Identity.generate().peer_id, Identity.generate().peer_id
    assert sum(limit.allows(stranger, known=False) for _ in range(5000)) == introductions.PER_PEER
    assert limit.allows(Identity.generate().peer_id, known=False)
    for _ in range(introductions.ALL_PEERS):
        limit.allows(Identity.generate().peer_id, known=False)
    assert not limit.allows(Identity.generate().peer_id, known=False)
    assert limit.allows(member, known=True)
    assert len(limit._counts) <= introductions.ALL_PEERS + 2


def test_hearsay_displaces_no_peers_own_word_and_is_bounded():
    book = AddressBook(Identity.generate().peer_id)
    victim = Identity.generate().peer_id
    own, lie = f"/ip4/10.0.0.1/tcp/1/p2p/{victim}", f"/ip4/6.6.6.6/tcp/1/p2p/{victim}"
    book.learn([own], hearsay=False)
    book.learn([lie] * 20, hearsay=True)
    assert book.of(victim) == [own, lie]
    for n in range(MAX_PEERS + 10):
        book.learn([f"/ip4/6.6.6.6/tcp/1/p2p/{_fake(n)}"], hearsay=True)
    assert len(book._heard) == MAX_PEERS
    assert book.of(victim) == [own]
    assert book.peers()[0] == victim
    assert book.newest(12, 4)[0] == victim
    assert len(book.newest(12, 4)) == 5


def _fake(n: int) -> str:
    """A cheap PeerID: the multihash of any 32 bytes."""
    return str(base58.b58encode(b"\x00\x24\x08\x01\x12\x20" + n.to_bytes(32, "big")), "ascii")


@pytest.mark.parametrize(
    "address",
    [
        "/unix/run/docker.sock/p2p/{}",
        "/ip4/1.2.3.4/udp/1/quic/p2p/{}",
        "/dnsaddr/many.example/p2p/{}",
        "/ip4/1.2.3.4/tcp/1/p2p/{}/p2p-circuit/p2p/{}",
        "/ip4/1.2.3.4/tcp/99999/p2p/{}",
        "/dns4/\x1b[31m/tcp/1/p2p/{}",
        "/ip4/1.2.3.4/tcp/1",
        "//",
        "",
    ],
)
def test_odd_addresses_are_never_dialled(address):
    peer = Identity.generate().peer_id
    assert not is_dialled(address.replace("{}", peer))
    assert is_dialled(f"/dns4/a.example/tcp/1/p2p/{peer}")


def test_a_partners_reason_is_one_of_ours():
    assert known_reason(Reason.NOT_DUE) == Reason.NOT_DUE
    assert known_reason("invented-7") == Reason.REFUSED


async def test_a_call_that_was_cancelled_just_now_waits_no_more():
    waiting = _Waiting()
    waiting["a"], waiting["b"] = asyncio.Future(), asyncio.Future()
    waiting["a"].cancel()
    assert "a" not in waiting
    assert "b" in waiting
    assert "c" not in waiting


async def test_calls_that_were_cancelled_before_they_began_are_forgotten():
    handling = _Handling()
    for n in range(100):
        handling[n] = asyncio.create_task(asyncio.sleep(60))
        handling[n].cancel()
    tasks = list(handling.values())
    await asyncio.gather(*tasks, return_exceptions=True)
    assert not handling
