"""Matching: every peer computes the same disjoint pairs, and everybody meets everybody."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xpeer.gossip import matching
from xpeer.identity import PeerId

SWARM = "5a" * 32
PEERS = [PeerId(f"12D3KooW{i:03d}") for i in range(256)]

VECTOR = [
    [(0, 5), (2, 6), (1, 4)],
    [(0, 2), (5, 6), (1, 3)],
    [(0, 1), (2, 5), (3, 6)],
    [(3, 6), (0, 1), (2, 4)],
]
FRAGMENTS = [3, 1, 0, 2, 4, 4, 1, 0, 2, 3]

rosters = st.lists(st.sampled_from(PEERS), min_size=0, max_size=16, unique=True)
slots = st.integers(0, 10**10)


@given(rosters, slots)
@settings(max_examples=80)
def test_partner_of_partner_is_me_and_each_has_one_pair(roster: list[PeerId], slot: int) -> None:
    pairs = matching.matching(SWARM, slot, roster)
    paired = list(itertools.chain.from_iterable(pairs))
    assert len(paired) == len(set(paired)) == len(roster) // 2 * 2
    for me in roster:
        found = matching.partner(SWARM, slot, roster, me)
        if me not in paired:
            assert found == []
            continue
        assert matching.partner(SWARM, slot, roster, found[0])[0] == me
        assert set(found) == set(roster) - {me}
        assert len(found) == len(roster) - 1


@given(rosters, slots, st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_order_and_duplicates_of_the_roster_do_not_matter(roster, slot, random) -> None:
    shuffled = [*roster, *roster[:3]]
    random.shuffle(shuffled)
    assert matching.matching(SWARM, slot, shuffled) == matching.matching(SWARM, slot, roster)


def test_strangers_and_the_lonely_have_no_partner() -> None:
    assert matching.partner(SWARM, 1, PEERS[:4], PEERS[9]) == []
    assert matching.partner(SWARM, 1, [PEERS[0]], PEERS[0]) == []
    assert matching.partner(SWARM, 1, [], PEERS[0]) == []


def test_the_same_everywhere() -> None:
    """A vector: peers of different machines and versions have to agree on it."""
    names = {peer: i for i, peer in enumerate(PEERS)}
    got = [
        [(names[a], names[b]) for a, b in matching.matching(SWARM, slot, PEERS[:7])]
        for slot in (0, 1, 2, 1_700_000_000)
    ]
    assert got == VECTOR
    assert [matching.fragment_of(SWARM, slot, 5) for slot in range(10)] == FRAGMENTS


def test_another_swarm_or_slot_is_another_matching() -> None:
    here = matching.matching(SWARM, 8, PEERS[:16])
    assert here != matching.matching("5b" * 32, 8, PEERS[:16])
    assert here != matching.matching(SWARM, 16, PEERS[:16])


def test_every_pair_meets() -> None:
    for n in (2, 3, 4, 5, 8, 12):
        met = {pair for slot in range(16 * n) for pair in matching.matching(SWARM, slot, PEERS[:n])}
        assert met == set(itertools.combinations(PEERS[:n], 2))


def test_pairs_meet_equally_often() -> None:
    n, slots_seen = 6, 3000
    counts = dict.fromkeys(itertools.combinations(PEERS[:n], 2), 0)
    for slot in range(slots_seen):
        for pair in matching.matching(SWARM, slot, PEERS[:n]):
            counts[pair] += 1
    expected = slots_seen * (n // 2) / len(counts)
    assert all(abs(count - expected) < 0.12 * expected for count in counts.values())


@pytest.mark.parametrize(("n", "most"), [(8, 1.6), (16, 2.4), (32, 3.0), (256, 5.5)])
def test_a_peer_that_lacks_one_member_agrees_with_most_others(n: int, most: float) -> None:
    trials, disturbed = 150 if n < 256 else 40, 0
    for trial in range(trials):
        slot, gone = 1_000_003 * trial, PEERS[trial % n]
        before = {p for p in matching.matching(SWARM, slot, PEERS[:n]) if gone not in p}
        rest = [p for p in PEERS[:n] if p != gone]
        disturbed += len(before - set(matching.matching(SWARM, slot, rest)))
    assert disturbed / trials < most  # a shuffle would disturb almost all


def test_recent_partners_are_avoided_above_four_members() -> None:
    def repeats(n: int) -> float:
        seen = [set(matching.matching(SWARM, slot, PEERS[:n])) for slot in range(400)]
        again = sum(len(now & last) for last, now in itertools.pairwise(seen))
        return again / sum(map(len, seen))

    assert repeats(5) < 0.05  # 0.2 by chance
    assert repeats(8) < 0.07  # 0.14 by chance
    assert repeats(3) > 0.2  # three members have no choice


def test_five_members_meet_others_in_consecutive_slots_of_a_block() -> None:
    """With five members two pairs are always left that did not meet last time."""
    for block in range(50):
        for slot in range(block * 8 + 1, block * 8 + 8):
            now = set(matching.matching(SWARM, slot, PEERS[:5]))
            recent = set(matching.matching(SWARM, slot - 1, PEERS[:5]))
            assert len(now & recent) <= 1
            first = matching.matching(SWARM, slot, PEERS[:5])[0]
            assert first not in recent


def test_every_cycle_of_slots_visits_every_fragment_once() -> None:
    orders = set()
    for cycle in range(20):
        order = tuple(matching.fragment_of(SWARM, cycle * 5 + i, 5) for i in range(5))
        assert sorted(order) == [0, 1, 2, 3, 4]
        orders.add(order)
    assert len(orders) > 10


def test_slots_follow_the_clock() -> None:
    assert matching.slot_number(0.99, 1.0) == 0
    assert matching.slot_number(1.0, 1.0) == 1
    assert matching.slot_number(1_700_000_000.6, 0.5) == 3_400_000_001
