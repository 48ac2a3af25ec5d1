"""Chains, digests and padding, against plain references."""

from __future__ import annotations

import hashlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xpeer.identity import Domain, Identity, PeerId
from xpeer.network.about import About
from xpeer.roster import dht_cards, spreading
from xpeer.roster.cards import (
    LINK_S,
    LINKS,
    Beat,
    Known,
    LivenessChain,
    MemberCard,
    MemberRecord,
    SignedCard,
)

SWARM = "5a" * 32
CHAIN = LivenessChain.begin(1000.0)
OWNERS = [Identity.generate() for _ in range(6)]


def known(number: int, link: int, version: int = 1) -> Known:
    identity = OWNERS[number]
    record = MemberRecord(identity.peer_id, [], "member", "training", 1.0, 0)
    body = msgspec.msgpack.encode(MemberCard(record, version, 1000.0, 40.0, CHAIN.links[0]))
    signed = SignedCard(body, identity.sign(Domain.CARD, SWARM.encode() + body))
    card = signed.open(identity.peer_id, SWARM)
    assert card is not None
    beat = Beat(link, CHAIN.links[link])
    return Known(PeerId(identity.peer_id), signed, card, beat, beat.alive_until(card))


def test_a_chain_is_hashed_from_its_secret_end() -> None:
    value = CHAIN.links[-1]
    for expected in reversed(CHAIN.links[:-1]):
        value = hashlib.blake2b(value, digest_size=16, person=b"xpeer/beat/v1").digest()
        assert value == expected
    assert len(CHAIN.links) == LINKS + 1
    assert CHAIN.links[-1].hex() not in repr(CHAIN)


@given(st.integers(0, LINKS), st.integers(0, LINKS))
@settings(max_examples=60)
def test_only_later_links_follow(one: int, other: int) -> None:
    first, second = Beat(one, CHAIN.links[one]), Beat(other, CHAIN.links[other])
    assert second.follows(first) == (other >= one)
    if other > one:
        assert not Beat(other, CHAIN.links[one]).follows(first)
        assert not Beat(other - 1, CHAIN.links[other]).follows(first)


@given(st.floats(0, LINKS * LINK_S), st.sampled_from([5.0, 10.0, 20.0, 75.0]))
def test_links_are_shown_no_earlier_than_their_time(after_s: float, every_s: float) -> None:
    beat = CHAIN.beat(1000.0 + after_s, every_s)
    shown_s, rounding = beat.link * LINK_S, 1e-6
    assert after_s - every_s - rounding < shown_s <= after_s + rounding
    assert beat.value == CHAIN.links[beat.link]


def test_a_chain_ends_before_its_links_do() -> None:
    assert not CHAIN.ends(1000.0)
    assert CHAIN.ends(1000.0 + LINKS * LINK_S - 299)
    assert CHAIN.beat(1e9).link == LINKS


def test_a_card_is_its_owners_and_its_swarms() -> None:
    member = known(0, 0)
    signed, owner = member.signed, member.owner
    assert signed.open(owner, SWARM) == member.card
    assert signed.open(owner, "5b" * 32) is None
    assert signed.open(OWNERS[1].peer_id, SWARM) is None
    altered = msgspec.structs.replace(signed, body=signed.body + b"\x00")
    assert altered.open(owner, SWARM) is None
    nonsense = OWNERS[0].sign(Domain.CARD, SWARM.encode() + b"\xc1")
    assert SignedCard(b"\xc1", nonsense).open(owner, SWARM) is None


members = st.dictionaries(
    st.integers(0, len(OWNERS) - 1), st.tuples(st.integers(0, 40), st.integers(1, 2)), max_size=6
)


@given(members, members)
@settings(max_examples=60)
def test_a_digest_brings_what_its_sender_lacks(ours, theirs) -> None:
    salt = spreading.new_salt()
    we = {number: known(number, *state) for number, state in ours.items()}
    they = {number: known(number, *state) for number, state in theirs.items()}
    told = spreading.read_digest(spreading.digest_of(they.values(), salt))
    assert len(told) == len(they)
    cards, beats = spreading.later_than(told, we.values(), salt)
    expected_cards = {n for n in we if n not in they or they[n].signed != we[n].signed}
    expected_beats = {n for n in set(we) - expected_cards if we[n].beat.link > they[n].beat.link}
    assert {m.owner for m in cards} == {we[n].owner for n in expected_cards}
    assert {m.owner for m in beats} == {we[n].owner for n in expected_beats}
    packed = spreading.pack_beats(beats, salt)
    assert len(packed) == 22 * len(beats)
    unpacked = spreading.unpack_beats(packed + b"rest", they.values(), salt)
    assert {m.owner: beat for m, beat in unpacked} == {m.owner: m.beat for m in beats}


@pytest.mark.parametrize("size", [0, 1, 253, 254, 255, 256, dht_cards.MAX_RECORD_BYTES])
def test_padding_is_undone(size: int) -> None:
    padded = dht_cards._pad(b"x" * size)
    assert len(padded) % dht_cards.PAD_BYTES == 0
    assert dht_cards._unpad(padded) == b"x" * size


def test_padding_is_bounded() -> None:
    with pytest.raises(ValueError, match="roster record"):
        dht_cards._pad(bytes(dht_cards.MAX_RECORD_BYTES + 1))


@pytest.mark.parametrize("change", [{"phase": "training\n"}, {"zone": "z\n"}])
def test_no_word_of_a_card_ends_in_a_line_break(change) -> None:
    record = MemberRecord("12D3KooWA", [], "member", "training", 1.0, 0)
    said = msgspec.msgpack.encode(msgspec.structs.replace(record, **change))
    with pytest.raises(msgspec.ValidationError, match="regex"):
        msgspec.msgpack.decode(said, type=MemberRecord)


def test_no_name_ends_in_a_line_break() -> None:
    with pytest.raises(msgspec.ValidationError, match="regex"):
        msgspec.msgpack.decode(msgspec.msgpack.encode(About("me\n")), type=About)
