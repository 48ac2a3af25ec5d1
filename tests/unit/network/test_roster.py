"""Roster records without a network: sealed, padded, spread over keys, and believed in part."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from hivemind.utils import get_dht_time
from hivemind.utils.timed_storage import ValueWithExpiration

from xpeer.identity import Identity
from xpeer.manifest import Genesis
from xpeer.network import roster as roster_module
from xpeer.network.invites import grant
from xpeer.network.membership import Credential, Membership, Role
from xpeer.network.roster import MAX_RECORD_BYTES, PAD_BYTES, MemberRecord, Roster

ADMIN = Identity.generate()
GENESIS = Genesis(ADMIN.verify_key, b"h" * 32)
KEY = b"k" * 32


class Node:
    """Stands for Swarm and its DHT: remembers what is stored, returns what it is told to."""

    def __init__(self) -> None:
        self.identity = Identity.generate()
        self.peer_id = self.identity.peer_id
        self.membership = Membership(GENESIS.swarm_id, None)
        self.dht = self
        self.stored: list[tuple[str, bytes, float, str]] = []
        self.shards: dict[str, Any] = {}
        self.learnt: list[str] = []
        self.fails = False

    async def store(self, key: str, value: bytes, expiration: float, subkey: str) -> bool:
        if self.fails:
            raise ConnectionError("the sidecar is gone")
        self.stored.append((key, value, expiration, subkey))
        return True

    async def get_many(self, keys: list[str], sufficient_expiration_time: float) -> dict[str, Any]:
        if self.fails:
            raise ConnectionError("the sidecar is gone")
        return {key: self.shards.get(key) for key in keys}

    def learn(self, addresses: list[str]) -> None:
        self.learnt += addresses

    def admit(self, identity: Identity, role: Role = "member") -> None:
        certificate = grant(GENESIS, identity.peer_id, role, 3600, time.time())
        credential = Credential.issue(ADMIN, certificate, identity.peer_id)
        self.membership.admit(identity.peer_id, credential.to_bytes())

    def roster(self, key: bytes = KEY, max_members: int = 64) -> Roster:
        return Roster(cast(Any, self), key, max_members)

    def holds(self, roster: Roster, owner: str, sealed: object, ttl_s: float = 30.0) -> None:
        """The DHT returns this for the owner."""
        item = ValueWithExpiration(sealed, get_dht_time() + ttl_s)
        shard = self.shards.setdefault(roster._key_of(owner), SimpleNamespace(value={}))
        shard.value[owner] = item


def record_of(peer_id: str, **changes: object) -> MemberRecord:
    address = f"/ip4/192.0.2.1/tcp/4001/p2p/{peer_id}"
    record = MemberRecord(peer_id, [address], "member", "training", 1.0, 7)
    return msgspec.structs.replace(record, **changes)


def sealed(roster: Roster, record: MemberRecord) -> bytes:
    return bytes(roster._box.encrypt(roster_module._pad(msgspec.msgpack.encode(record))))


@pytest.fixture
def node() -> Node:
    return Node()


async def test_what_is_stored_is_ours_sealed_and_says_nothing_by_its_size(node: Node):
    roster = node.roster()
    for phase in ("a", "training"):
        assert await roster.announce(record_of(node.peer_id, phase=phase), ttl_s=40)
    (key, first, expiration, subkey), (_, second, _, _) = node.stored
    assert subkey == node.peer_id
    assert get_dht_time() < expiration <= get_dht_time() + 40
    assert len(first) == len(second)
    assert (len(first) - 40) % PAD_BYTES == 0  # SecretBox: nonce and tag
    assert node.peer_id.encode() not in first
    assert key == roster._key_of(node.peer_id)
    assert KEY.hex() not in key


def test_keys_follow_the_swarm_key_and_spread_the_members(node: Node):
    assert not set(node.roster()._keys) & set(node.roster(b"x" * 32)._keys)
    assert len(node.roster(max_members=64)._keys) == 1
    many = node.roster(max_members=1000)
    assert len(many._keys) == 16
    used = {many._key_of(Identity.generate().peer_id) for _ in range(200)}
    assert len(used) > 8


async def test_members_are_refreshed_and_expire(node: Node, monkeypatch: pytest.MonkeyPatch):
    roster, other = node.roster(), Identity.generate()
    node.admit(other)
    node.holds(roster, other.peer_id, sealed(roster, record_of(other.peer_id)), ttl_s=30)
    await roster.refresh()
    assert roster.members()[other.peer_id].slot == 7
    assert node.learnt == record_of(other.peer_id).addresses
    later = sealed(roster, record_of(other.peer_id, slot=8))
    node.holds(roster, other.peer_id, later, ttl_s=60)
    await roster.refresh()
    assert roster.members()[other.peer_id].slot == 8
    node.holds(roster, other.peer_id, sealed(roster, record_of(other.peer_id, slot=1)), ttl_s=10)
    await roster.refresh()  # an earlier record does not displace the later one
    assert roster.members()[other.peer_id].slot == 8
    now = get_dht_time()
    monkeypatch.setattr(roster_module, "get_dht_time", lambda: now + 61)
    assert roster.members() == {}


async def test_what_is_not_the_owners_own_is_ignored(node: Node):
    roster, member, stranger = node.roster(), Identity.generate(), Identity.generate()
    node.admit(member)
    good = sealed(roster, record_of(member.peer_id))
    truncated, other_key = good[:-1], sealed(node.roster(b"x" * 32), record_of(member.peer_id))
    about_another = sealed(roster, record_of(stranger.peer_id))
    not_a_record = bytes(roster._box.encrypt(roster_module._pad(b"\xc1")))
    for value in (truncated, other_key, about_another, not_a_record, b"", None, 7):
        node.holds(roster, member.peer_id, value)
        await roster.refresh()
        assert roster.members() == {}
    node.holds(roster, stranger.peer_id, about_another)  # it has shown no certificate
    await roster.refresh()
    assert roster.members() == {}
    node.holds(roster, member.peer_id, good)
    await roster.refresh()
    assert set(roster.members()) == {member.peer_id}


async def test_the_role_is_the_admins_word_and_addresses_are_the_owners(node: Node):
    roster, member = node.roster(), Identity.generate()
    node.admit(member, "observer")
    own = record_of(member.peer_id).addresses
    others = record_of(Identity.generate().peer_id).addresses
    lie = record_of(member.peer_id, role="admin", addresses=[*own, *others, "/unix/x"])
    node.holds(roster, member.peer_id, sealed(roster, lie))
    await roster.refresh()
    seen = roster.members()[member.peer_id]
    assert (seen.role, seen.addresses) == ("observer", own)


async def test_no_more_members_than_the_manifest_allows(node: Node):
    roster = node.roster(max_members=2)
    for _ in range(4):
        member = Identity.generate()
        node.admit(member)
        node.holds(roster, member.peer_id, sealed(roster, record_of(member.peer_id)))
    await roster.refresh()
    assert len(roster.members()) == 2


async def test_a_dht_that_fails_costs_nothing_but_this_time(node: Node, caplog):
    roster, other = node.roster(), Identity.generate()
    node.admit(other)
    node.holds(roster, other.peer_id, sealed(roster, record_of(other.peer_id)))
    await roster.refresh()
    node.fails = True
    assert not await roster.announce(record_of(node.peer_id))
    await roster.refresh()
    assert set(roster.members()) == {other.peer_id}
    assert "the DHT failed" in caplog.text


def test_padding_is_undone_and_bounded():
    for size in (0, 1, 253, 254, 255, 256, MAX_RECORD_BYTES):
        padded = roster_module._pad(b"x" * size)
        assert len(padded) % PAD_BYTES == 0
        assert roster_module._unpad(padded) == b"x" * size
    with pytest.raises(ValueError, match="roster record"):
        roster_module._pad(bytes(MAX_RECORD_BYTES + 1))
