"""Rosters without a network: they agree soon, heal, and believe only what an owner signed."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from benchmarks.scale.rosters import Net, Node, measure
from xpeer.errors import ConfigError, PeerError
from xpeer.identity import Domain, Identity
from xpeer.network.dht import MAX_TTL_S
from xpeer.network.membership.certificates import Credential
from xpeer.network.membership.invites import grant
from xpeer.network.membership.keyring import KeyRing
from xpeer.roster import cards as cards_module
from xpeer.roster import roster as roster_module
from xpeer.roster import spreading
from xpeer.roster.cards import LINK_S, LINKS, Beat, LivenessChain, MemberCard, SignedCard
from xpeer.roster.dht_cards import Stored
from xpeer.roster.pace import (
    BEAT_BYTES,
    BEATS_BYTES_PER_MINUTE,
    BEATS_PER_LIFETIME,
    LIFETIMES_S,
    TTL_S,
    bounded_lifetime_s,
    question_every_s,
)
from xpeer.roster.roster import PROTOCOL, Roster
from xpeer.roster.spreading import Answer, News, Question


@pytest.fixture
def net() -> Net:
    return Net()


async def swarm_of(net: Net, number: int) -> list[Node]:
    first = net.join()
    nodes = [first, *(net.join([first]) for _ in range(number - 1))]
    await net.run(30)
    assert net.agree()
    assert len(first.roster.members()) == number
    return nodes


def news_of(node: Node, **changes: object) -> News:
    """What anybody may relay of a node; its card signed anew with changes."""
    [news] = node.roster._news_of([node.roster._known[node.peer_id]])
    card = msgspec.msgpack.decode(news.signed.body, type=MemberCard)
    body = msgspec.msgpack.encode(msgspec.structs.replace(card, **changes))
    signature = node.sign(Domain.CARD, node.membership.swarm_id.encode() + body)
    return msgspec.structs.replace(news, signed=SignedCard(body, signature))


def hear(node: Node, *news: News, beats: bytes = b"") -> set[str]:
    return {*node.roster._learn(list(news), beats, bytes(8))}


async def test_members_meet_stay_listed_and_expire(net: Net) -> None:
    nodes = await swarm_of(net, 6)
    await net.run(3 * TTL_S)
    assert net.agree()
    assert len(nodes[0].roster.members()) == 6
    silent = nodes[3]
    del net.nodes[silent.peer_id]
    await net.run(TTL_S + 5)
    assert silent.peer_id not in nodes[0].roster.members()
    assert net.agree()


async def test_a_change_is_seen_within_seconds_and_a_new_slot_is_none(net: Net) -> None:
    nodes = await swarm_of(net, 6)
    signed = nodes[1].roster._known[nodes[1].peer_id].signed
    nodes[1].record = msgspec.structs.replace(nodes[1].record, slot=8)
    await nodes[1].roster.announce(nodes[1].record)
    assert nodes[1].roster._known[nodes[1].peer_id].signed == signed
    nodes[1].record = msgspec.structs.replace(nodes[1].record, phase="closing", zone="eu")
    await nodes[1].roster.announce(nodes[1].record)
    await net.run(12)
    for node in nodes:
        assert node.roster.members()[nodes[1].peer_id].phase == "closing"
        assert node.roster.zones()[nodes[1].peer_id] == "eu"


@pytest.mark.parametrize(
    "changes",
    [
        {"zone": "not a zone"},
        {"phase": "Training!"},
        {"addresses": ["/ip4/192.0.2.1/tcp/4001/p2p/" + "x" * 300]},
        {"addresses": [f"/dns4/{n}{'a' * 280}/tcp/4001" for n in range(8)]},  # together too long
    ],
    ids=["zone", "phase", "address", "addresses"],
)
async def test_a_card_that_nobody_could_read_is_not_signed(
    net: Net, changes: dict[str, Any]
) -> None:
    node = net.join()
    await node.roster.announce(node.record)
    before = node.roster._known[node.peer_id].signed
    with pytest.raises(ConfigError, match="can't be read by other members") as raised:
        await node.roster.announce(msgspec.structs.replace(node.record, **changes))
    assert "network.announce" in raised.value.remedy
    assert node.roster._known[node.peer_id].signed == before


async def test_two_halves_that_dropped_one_another_find_together(net: Net) -> None:
    nodes = await swarm_of(net, 8)
    half = {node.peer_id for node in nodes[:4]}
    net.cut = lambda one, other: (one in half) != (other in half)
    await net.run(TTL_S + 10)
    assert len(nodes[0].roster.members()) == len(nodes[7].roster.members()) == 4
    net.cut = lambda one, other: False
    await net.run(30)
    assert net.agree()
    assert len(nodes[0].roster.members()) == 8


async def test_rosters_agree_within_30_s_and_cost_little() -> None:
    found = await measure(16, minutes=1)
    assert max(found.joined_s, found.changed_s, found.disagreed_s, found.healed_s) < 30
    assert found.silent_s <= TTL_S
    assert found.steady_disagreed_s == 0
    assert found.bytes_per_peer_minute < 25_000


async def test_who_knows_nobody_reads_the_dht(net: Net) -> None:
    nodes = await swarm_of(net, 3)
    lost = net.join()  # has no address of anybody, and only the DHT's keys
    await lost.roster.refresh()
    assert set(lost.roster.members()) == {node.peer_id for node in nodes}
    assert lost.traffic.reads == len(lost.roster._shards.keys)


async def test_no_more_members_than_the_manifest_allows() -> None:
    net = Net(max_members=3)
    first = net.join()
    for _ in range(5):
        net.join([first])
    await net.run(30)
    assert all(len(node.roster.members()) <= 3 for node in net.nodes.values())


@pytest.mark.parametrize("members", [1, 2, 32, 64, 65, 256, 600, 4096])
def test_links_spread_before_they_end_and_cost_is_bounded(members: int) -> None:
    lifetime_s = bounded_lifetime_s(members)
    shown_every_s = lifetime_s / BEATS_PER_LIFETIME
    spreading_s = question_every_s(members) * (math.log2(max(2, members)) + 4)
    fits = (
        lifetime_s - shown_every_s >= spreading_s
        and 60 / shown_every_s * BEAT_BYTES * members <= BEATS_BYTES_PER_MINUTE
    )
    assert fits or lifetime_s == LIFETIMES_S[-1]
    assert fits or members > 600
    assert (lifetime_s == TTL_S) == (members <= 64)


async def test_a_lifetime_does_not_swing(net: Net) -> None:
    roster = (await swarm_of(net, 2))[0].roster
    assert roster._own._lifetime_of(70) == 80
    roster._own._lifetime_s = 80.0
    assert roster._own._lifetime_of(60) == 80
    assert roster._own._lifetime_of(50) == 40


async def test_only_the_owner_speaks_for_itself(net: Net) -> None:
    reader, bad, victim = await swarm_of(net, 3)
    known = reader.roster._known[victim.peer_id]
    later = {"version_ms": int(net.now_s * 1000), "since_s": net.now_s}
    forged = news_of(bad, record=victim.record, **later)
    for lie in (
        forged,  # signed by another
        msgspec.structs.replace(forged, owner=victim.peer_id),
        msgspec.structs.replace(news_of(victim, **later), credential=news_of(bad).credential),
        msgspec.structs.replace(news_of(victim, **later), beat=Beat(3, bytes(16))),
        news_of(victim, version_ms=int((net.now_s + 3600) * 1000)),  # from the future
        news_of(victim, version_ms=known.card.version_ms - 1),  # an earlier one
    ):
        assert hear(reader, lie) == set()
    assert reader.roster._known[victim.peer_id] is known
    moved = news_of(victim, record=msgspec.structs.replace(victim.record, phase="left"), **later)
    assert hear(reader, moved) == {victim.peer_id}


async def test_nobody_is_kept_alive_by_another(net: Net) -> None:
    reader, bad, victim = await swarm_of(net, 3)
    known = reader.roster._known[victim.peer_id]
    link, until = known.beat.link, known.until
    for value in (bytes(16), known.beat.value, known.card.anchor):
        fake = msgspec.structs.replace(known.beat, link=link + 1, value=value)
        assert not known.advance(fake, net.now_s + 100)
    true = victim.roster._own._chain
    assert true is not None
    early = int((net.now_s + 1000 - true.since_s) / LINK_S)
    assert not known.advance(Beat(early, true.links[early]), net.now_s)  # from the future
    assert known.until == until
    assert bad.roster._known[victim.peer_id].until <= net.now_s + TTL_S


async def test_a_message_makes_us_walk_few_links(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, victim = await swarm_of(net, 2)
    known = reader.roster._known[victim.peer_id]
    net.now_s += 30
    chain = victim.roster._own._chain
    assert chain is not None
    beat = chain.beat(net.now_s)
    with monkeypatch.context() as patch:
        patch.setattr(roster_module, "MAX_WALK", 1)
        packed = spreading._BEAT.pack(spreading._name(victim.peer_id, bytes(8)), *_fields(beat))
        hear(reader, beats=packed)
        assert known.beat.link < beat.link
    hear(reader, beats=packed)
    assert known.beat == beat


def _fields(beat: Beat) -> tuple[int, bytes]:
    return beat.link, beat.value


async def test_the_role_is_the_admins_word_and_addresses_are_the_owners(net: Net) -> None:
    reader, liar = await swarm_of(net, 2)
    others = f"/ip4/6.6.6.6/tcp/1/p2p/{reader.peer_id}"
    liar.record = msgspec.structs.replace(
        liar.record, role="admin", addresses=[*liar.record.addresses, others, "/unix/x"]
    )
    await liar.roster.announce(liar.record)
    await net.run(6)
    seen = reader.roster.members()[liar.peer_id]
    assert (seen.role, seen.addresses) == ("member", liar.record.addresses[:1])


async def test_strangers_messages_and_other_keys_are_no_answer(net: Net) -> None:
    one, other = await swarm_of(net, 2)
    foreign = Roster(one.roster._swarm, KeyRing(b"x" * 32), 64)
    handler = other.handlers[PROTOCOL]
    for request in (b"", b"x" * 100, foreign._seal(Question(bytes(8), b"")), one.roster._seal(
        Answer(more=True)
    )):  # fmt: skip
        assert await handler(one.peer_id, request) == b""
    cut = one.roster._seal(Question(bytes(8), b"\x01\x02\x03", beats=b"\x07"))
    assert await handler(one.peer_id, cut) != b""


async def test_questions_are_paced(net: Net) -> None:
    one, other = await swarm_of(net, 2)
    question = one.roster._seal(Question(bytes(8), b""))
    replies = [await other.handlers[PROTOCOL](one.peer_id, question) for _ in range(40)]
    assert replies.count(b"") >= 19


async def test_an_expired_certificate_ends_a_listing(net: Net) -> None:
    reader, _ = await swarm_of(net, 2)
    guest = Identity.generate()
    granted = grant(net.genesis, guest.peer_id, "member", 20, net.now_s)
    certificate = msgspec.structs.replace(granted, not_after_unix_s=int(net.now_s) + 20)
    credential = Credential.issue(net.admin, certificate, guest.peer_id)
    chain = LivenessChain.begin(net.now_s)
    record = msgspec.structs.replace(reader.record, peer_id=guest.peer_id, addresses=[])
    card = MemberCard(record, int(net.now_s * 1000), net.now_s, TTL_S, chain.links[0])
    body = msgspec.msgpack.encode(card)
    signature = guest.sign(Domain.CARD, net.genesis.swarm_id.encode() + body)
    news = News(guest.peer_id, credential.to_bytes(), SignedCard(body, signature), chain.beat(0.0))
    assert hear(reader, news) == {guest.peer_id}
    net.now_s += 25
    assert hear(reader, news) == set()
    reader.roster._expire(net.now_s)
    assert guest.peer_id not in reader.roster.members()


async def test_a_dht_that_fails_costs_nothing_but_this_time(net: Net, caplog) -> None:
    one, other = await swarm_of(net, 2)

    async def broken(*_: object, **__: object) -> bool:
        raise ConnectionError("the sidecar is gone")

    one.dht.store = one.dht.get_many = broken
    one.record = msgspec.structs.replace(one.record, phase="closing")
    assert not await one.roster.announce(one.record)
    net.cut = lambda a, b: True
    net.now_s += 20
    await one.roster.refresh()
    assert other.peer_id in one.roster.members()
    assert "the DHT failed" in caplog.text


async def test_what_is_stored_is_sealed_and_says_nothing_by_its_size(net: Net) -> None:
    node = (await swarm_of(net, 1))[0]
    sizes = set()
    for phase in ("a", "training"):
        await node.roster.announce(msgspec.structs.replace(node.record, phase=phase))
        [(key, shard)] = net.stored.items()
        [(owner, (value, until))] = shard.items()
        sizes.add(len(value))
        assert (owner, key) == (node.peer_id, node.roster._shards.key_of(node.peer_id))
        assert net.now_s < until <= net.now_s + MAX_TTL_S
        assert node.peer_id.encode() not in value
    assert len(sizes) == 1


def test_keys_follow_the_swarm_key_and_spread_the_members(net: Net) -> None:
    node = net.join()
    mine, others = node.roster._shards, Roster(node.roster._swarm, KeyRing(b"x" * 32), 256)._shards
    assert not set(mine.keys) & set(others.keys)
    assert len(mine.keys) == 16
    assert len({mine.key_of(Identity.generate().peer_id) for _ in range(200)}) > 12


async def test_stored_values_that_do_not_open_are_left_out(net: Net) -> None:
    reader, owner = await swarm_of(net, 2)
    shards, key = reader.roster._shards, reader.roster._shards.key_of(owner.peer_id)
    good, until = net.stored[key][owner.peer_id]
    box = shards._keyring.box(b"xpeer/shard/v1")
    for value in (good[:-1], b"", None, 7, box.encrypt(b"\x00\x01\xc1" + bytes(253))):
        net.stored[key] = {owner.peer_id: (value, until)}  # type: ignore[dict-item]
        assert await shards.read([key]) == []
    net.stored[key] = {owner.peer_id: (good, until)}
    [(name, stored)] = await shards.read([key])
    assert name == owner.peer_id
    assert isinstance(stored, Stored)


async def test_silence_of_one_is_no_error(net: Net) -> None:
    one, other = await swarm_of(net, 2)
    net.cut = lambda a, b: True
    with pytest.raises(PeerError):
        await one.call(other.peer_id, PROTOCOL, b"", 1.0)
    await one.roster.refresh()
    assert other.peer_id in one.roster.members()


async def test_no_message_costs_more_hashing_than_its_bound(
    net: Net, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cards count as beats do: their links are checked only as far as the message's bound."""
    first, other = await swarm_of(net, 2)
    since_s, version_ms = net.now_s - LINK_S * LINKS, int(net.now_s * 1000)
    news = [
        msgspec.structs.replace(
            news_of(other, since_s=since_s, version_ms=version_ms + n),
            beat=Beat(LINKS, bytes(16)),
        )
        for n in range(spreading.MAX_CARDS)
    ]
    hashed = 0
    before = cards_module.next_link

    def counted(value: bytes) -> bytes:
        nonlocal hashed
        hashed += 1
        return before(value)

    monkeypatch.setattr(cards_module, "next_link", counted)
    assert hear(first, *news) == set()
    assert roster_module.MAX_WALK - LINKS < hashed <= roster_module.MAX_WALK
