"""Whoever seals with the swarm key asks for it: one that is replaced is used from then on."""

from __future__ import annotations

from typing import Any, cast

import msgspec
import pytest
from nacl.exceptions import CryptoError
from nacl.secret import SecretBox

from benchmarks.scale.rosters import Net, Node
from tests.unit.network.test_agreement import Everybody
from xpeer.errors import PeerError, Reason
from xpeer.identity import Identity, blake2b
from xpeer.manifest.signed import SignedManifest
from xpeer.network import admission
from xpeer.network.admission import Admission
from xpeer.network.agreement import Party
from xpeer.network.membership.certificates import Credential
from xpeer.network.membership.invites import grant
from xpeer.network.membership.keyring import KeyRing
from xpeer.roster import roster
from xpeer.roster.dht_cards import Stored
from xpeer.roster.spreading import Answer, Question
from xpeer.wire.frames import HEADER, Kind
from xpeer.wire.session import Credentials, Handshake

OLD, NEW = b"k" * 32, b"n" * 32
SWARM, MODEL = "ab" * 32, b"m" * 32


def box(purpose: bytes, key: bytes) -> SecretBox:
    """As every version so far derives it."""
    return SecretBox(blake2b(purpose, key))


def opens(purpose: bytes, key: bytes, sealed: bytes) -> bool:
    try:
        box(purpose, key).decrypt(sealed)
    except (CryptoError, ValueError):
        return False
    return True


def names_of(key: bytes, number: int) -> set[str]:
    """Keys of the DHT, as every version so far derives them."""
    return {blake2b(b"xpeer/shard-key/v1", key, str(i).encode()).hex() for i in range(number)}


@pytest.fixture
def node() -> Node:
    return Net(max_members=64).join()


# The roster


async def answered(node: Node, key: bytes) -> bytes:
    """Ask a node as a member that has this key."""
    question = msgspec.msgpack.encode(Question(bytes(8), b""))
    sealed = bytes(box(b"xpeer/roster/v2", key).encrypt(question))
    return await node.handlers[roster.PROTOCOL](node.peer_id, sealed)


async def test_the_roster_opens_and_seals_with_the_key_of_now(node: Node) -> None:
    await node.roster.serve()
    assert opens(b"xpeer/roster/v2", OLD, await answered(node, OLD))
    assert await answered(node, NEW) == b""
    node.keyring.replace(NEW)
    assert opens(b"xpeer/roster/v2", NEW, await answered(node, NEW))
    assert await answered(node, OLD) == b""


async def test_two_rosters_understand_one_another_under_the_same_key_alone() -> None:
    net = Net()
    one = net.join()
    other = net.join([one])
    await net.run(10)
    one.keyring.replace(NEW)
    assert await one.roster._ask(other.peer_id, with_digest=True) is None
    other.keyring.replace(NEW)
    assert isinstance(await one.roster._ask(other.peer_id, with_digest=True), Answer)


# Cards in the DHT


async def test_cards_are_stored_under_names_and_keys_of_now(node: Node) -> None:
    shards, stored = node.roster._shards, node.net.stored
    assert set(shards.keys) == names_of(OLD, 4)
    await node.roster.announce(node.record)
    node.keyring.replace(NEW)
    assert set(shards.keys) == names_of(NEW, 4)
    assert shards.key_of(node.peer_id) in names_of(NEW, 4)
    await node.roster.announce(msgspec.structs.replace(node.record, phase="closing"))
    before, after = stored
    assert before in names_of(OLD, 4)
    assert after in names_of(NEW, 4)
    assert opens(b"xpeer/shard/v1", OLD, stored[before][node.peer_id][0])
    assert opens(b"xpeer/shard/v1", NEW, stored[after][node.peer_id][0])
    assert await shards.read([before]) == []
    [(owner, card)] = await shards.read([after])
    assert (owner, type(card)) == (node.peer_id, Stored)


# Sessions


def party(identity: Identity, keyring: KeyRing) -> Party:
    return Party(identity, SWARM, keyring, MODEL, 1, Everybody(SWARM, None))


def exchange_hellos(first: Handshake, second: Handshake) -> None:
    second.receive(first.hello())
    first.receive(second.hello())


def passes(first: Handshake, second: Handshake) -> bool:
    """Whether the second opens what the first seals, once both have said HELLO."""
    frame = first.session().sealer.seal(Kind.BULK, b"payload")
    opener = second.session().opener
    try:
        return opener.open(frame[: HEADER.size], frame[HEADER.size :]) == b"payload"
    except PeerError as e:
        assert e.reason == Reason.TAMPERED
        return False


@pytest.mark.parametrize(("key", "expected"), [(NEW, True), (OLD, False)])
def test_a_party_makes_handshakes_with_the_key_of_now(key: bytes, expected: bool) -> None:
    low, high = Identity.generate(), Identity.generate()
    ours = party(low, keyring := KeyRing(OLD))
    keyring.replace(NEW)
    first = ours.handshake(high.peer_id, "exchange", initiator=True)
    second = party(high, KeyRing(key)).handshake(low.peer_id, "exchange", initiator=False)
    exchange_hellos(first, second)
    assert passes(first, second) is expected


def test_a_handshake_asks_for_the_key_when_it_derives_those_of_frames() -> None:
    low, high = Identity.generate(), Identity.generate()
    keyring = KeyRing(OLD)
    first, second = (
        Handshake(
            Credentials(me, SWARM, keys, MODEL, 1),
            partner.peer_id,
            purpose="exchange",
            initiator=me is low,
        )
        for me, partner, keys in ((low, high, keyring), (high, low, KeyRing(NEW)))
    )
    exchange_hellos(first, second)
    assert not passes(first, second)
    keyring.replace(NEW)
    assert passes(first, second)


# Admission


async def test_a_newcomer_is_handed_the_key_of_now(node: Node) -> None:
    net, guest = node.net, Identity.generate()
    certificate = grant(net.genesis, guest.peer_id, "member", 60, net.now_s)
    credential = Credential.issue(net.admin, certificate, guest.peer_id)
    node.membership.admit(guest.peer_id, credential.to_bytes())
    signed = SignedManifest("{}", bytes(32), bytes(64))
    await admission.serve(cast(Any, node), signed, node.keyring)
    for key in (OLD, NEW):
        sealed = await node.handlers[admission.PROTOCOL](guest.peer_id, b"")
        expected = msgspec.msgpack.encode({"manifest": signed.to_bytes(), "swarm_key": key})
        assert guest.open(sealed) == expected
        assert msgspec.msgpack.decode(expected, type=Admission).swarm_key == key
        node.keyring.replace(NEW)
