"""Groups of k: disjoint, the same everywhere, and one exchange keeps the swarm's mean."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xpeer.gossip import matching
from xpeer.identity import PeerId

SWARM = "5a" * 32
PEERS = [PeerId(f"12D3KooW{i:03d}") for i in range(64)]

rosters = st.lists(st.sampled_from(PEERS), max_size=40, unique=True)
slots = st.integers(0, 10**10)
sizes = st.integers(2, matching.MAX_GROUP)


@given(rosters, slots, sizes)
@settings(max_examples=80)
def test_groups_are_disjoint_complete_and_of_size_k(roster, slot, k) -> None:
    found = matching.groups(SWARM, slot, roster, k)
    grouped = list(itertools.chain.from_iterable(found))
    assert len(grouped) == len(set(grouped))
    assert set(grouped) <= set(roster)
    left = len(roster) % k
    assert len(grouped) == len(roster) - (left if left == 1 else 0)
    expected = [k] * (len(roster) // k) + ([left] if left > 1 else [])
    assert [len(g) for g in found] == expected
    assert all(list(g) == sorted(g) for g in found)


@given(rosters, slots, sizes)
@settings(max_examples=40)
def test_every_member_of_a_group_names_the_others(roster, slot, k) -> None:
    for group in matching.groups(SWARM, slot, roster, k):
        for me in group:
            others = matching.group(SWARM, slot, roster, me, k)
            assert sorted([me, *others]) == list(group)


@given(rosters, slots)
@settings(max_examples=40)
def test_groups_of_two_are_the_matching_and_zero_is_all(roster, slot) -> None:
    assert matching.groups(SWARM, slot, roster, 2) == matching.matching(SWARM, slot, roster)
    together = matching.groups(SWARM, slot, roster, 0)
    assert together == ([tuple(sorted(roster))] if len(roster) > 1 else [])


@pytest.mark.parametrize("k", [-1, 1, 9])
def test_other_sizes_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match="groups of"):
        matching.groups(SWARM, 1, PEERS[:8], k)


def test_every_two_are_grouped_equally_often() -> None:
    n, k, seen = 12, 4, 3000
    counts: Counter[tuple[PeerId, ...]] = Counter()
    for slot in range(seen):
        for group in matching.groups(SWARM, slot, PEERS[:n], k):
            counts.update(itertools.combinations(group, 2))
    expected = seen * (k - 1) / (n - 1)
    assert len(counts) == n * (n - 1) // 2
    assert all(abs(count - expected) < 0.12 * expected for count in counts.values())


@pytest.mark.parametrize(("n", "k", "most"), [(32, 4, 6.0), (64, 4, 9.5), (64, 8, 4.5)])
def test_an_absence_leaves_other_groups_alone(n: int, k: int, most: float) -> None:
    trials, disturbed = 80, 0
    for trial in range(trials):
        slot, gone = 1_000_003 * trial, PEERS[trial % n]
        before = {g for g in matching.groups(SWARM, slot, PEERS[:n], k) if gone not in g}
        rest = [p for p in PEERS[:n] if p != gone]
        disturbed += len(before - set(matching.groups(SWARM, slot, rest, k)))
    assert disturbed / trials < most


def test_who_met_lately_is_seldom_grouped_again() -> None:
    def met(slot: int) -> set[tuple[PeerId, ...]]:
        found = matching.groups(SWARM, slot, PEERS[:32], 4)
        return {pair for group in found for pair in itertools.combinations(group, 2)}

    again = sum(len(met(s) & met(s + 1)) for s in range(200)) / (200 * 8 * 6)
    assert again < 0.05  # 3/31 by chance


@given(rosters, slots, sizes, st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_pairwise_merges_of_weight_1_over_k_keep_the_mean_whoever_is_missing(
    roster, slot, k, random
) -> None:
    """And make all of a complete group equal."""
    values = {peer: random.random() for peer in roster}
    after = dict(values)
    missing = {peer for peer in roster if random.random() < 0.2}
    for group in matching.groups(SWARM, slot, roster, k):
        for one, other in itertools.combinations(group, 2):
            if not missing & {one, other}:
                after[one] += (values[other] - values[one]) / k
                after[other] += (values[one] - values[other]) / k
        if len(group) == k and not missing & set(group):
            assert np.allclose([after[p] for p in group], after[group[0]])
    assert np.isclose(sum(after.values()), sum(values.values()))
