"""Zones: near members meet more often, and nobody is cut off."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xpeer.gossip import matching
from xpeer.identity import PeerId

SWARM = "5a" * 32
PEERS = [PeerId(f"12D3KooW{i:03d}") for i in range(40)]
FOUR_ZONES = {peer: f"zone-{i % 4}" for i, peer in enumerate(PEERS[:32])}
ONE_APART = {**FOUR_ZONES, PEERS[32]: "alone", PEERS[33]: ""}

zones = st.dictionaries(
    st.sampled_from(PEERS), st.sampled_from(["", "a", "b", "c"]), min_size=2, max_size=32
)
slots = st.integers(0, 10**10)


def inside(pairs: list[matching.Pair], labels: dict[PeerId, str]) -> float:
    return sum(labels[a] == labels[b] != "" for a, b in pairs) / len(pairs)


def mean_mixing_matrix(labels: dict[PeerId, str] | None, roster: list[PeerId], seen: int):
    """E[W] of merges with weight 1/2, over many slots: (n, n)."""
    index = {peer: i for i, peer in enumerate(roster)}
    total = np.zeros((len(roster), len(roster)))
    for slot in range(seen):
        total += np.eye(len(roster))
        for one, other in matching.matching(SWARM, slot, roster, labels):
            i, j = index[one], index[other]
            total[[i, j], [i, j]] -= 0.5
            total[[i, j], [j, i]] += 0.5
    return total / seen


def spectral_gap(mean: np.ndarray) -> float:
    """1 - lambda_2: E||theta - mean||^2 shrinks by at least this share in every slot, since W is a
    projection and so E[W^T W] = E[W].
    """
    return float(1 - np.sort(np.linalg.eigvalsh(mean))[-2])


@given(zones, slots)
@settings(max_examples=60)
def test_still_a_perfect_symmetric_matching(labels, slot) -> None:
    pairs = matching.matching(SWARM, slot, labels, labels)
    paired = list(itertools.chain.from_iterable(pairs))
    assert len(paired) == len(set(paired)) == len(labels) // 2 * 2
    for me in paired:
        found = matching.partner(SWARM, slot, labels, me, labels)
        assert matching.partner(SWARM, slot, labels, found[0], labels)[0] == me
        assert set(found) == set(labels) - {me}


@given(slots)
@settings(max_examples=60)
def test_in_one_of_two_slots_zones_come_first_and_the_other_is_as_without(slot) -> None:
    first = slot - slot % 2
    preferring = [s for s in (first, first + 1) if matching.prefers_zones(SWARM, s)]
    assert len(preferring) == 1
    roster = PEERS[:32]
    with_zones = matching.matching(SWARM, preferring[0], roster, FOUR_ZONES)
    assert inside(with_zones, FOUR_ZONES) > 0.6  # 7/31 by chance
    if first % matching.HISTORY_SLOTS == 0 and preferring[0] == first + 1:
        assert matching.matching(SWARM, first, roster, FOUR_ZONES) == matching.matching(
            SWARM, first, roster
        )


def test_without_labels_nothing_changes() -> None:
    for slot in range(64):
        plain = matching.matching(SWARM, slot, PEERS)
        assert matching.matching(SWARM, slot, PEERS, dict.fromkeys(PEERS, "")) == plain
        assert matching.matching(SWARM, slot, PEERS, {}) == plain


def test_an_empty_label_is_near_nobody() -> None:
    labels = dict.fromkeys(PEERS[:8], "") | {peer: peer for peer in PEERS[8:16]}
    seen = [pair for slot in range(300) for pair in matching.matching(SWARM, slot, labels, labels)]
    together = sum(labels[a] == labels[b] for a, b in seen)
    assert abs(together / len(seen) - 28 / 120) < 0.03  # as by chance


@pytest.mark.parametrize("labels", [FOUR_ZONES, ONE_APART], ids=["4x8", "4x8 and two alone"])
def test_connectivity_is_kept(labels: dict[PeerId, str]) -> None:
    """The spectral gap is at least half of the uniform one's, and near partners meet more often."""
    roster = list(labels)
    uniform = spectral_gap(mean_mixing_matrix(None, roster, 700))
    zoned = mean_mixing_matrix(labels, roster, 700)
    assert uniform > 0.4  # N / (2 (N - 1)) = 0.52 in the limit
    assert spectral_gap(zoned) > 0.5 * uniform
    same = np.array([[labels[a] == labels[b] != "" for b in roster] for a in roster])
    off = ~np.eye(len(roster), dtype=bool)
    assert zoned[same & off].mean() > 2.5 * zoned[~same].mean()
    assert (zoned > 0).all()  # everybody meets everybody


def test_groups_prefer_zones_as_well() -> None:
    roster = PEERS[:32]
    slot = next(s for s in range(8, 16) if matching.prefers_zones(SWARM, s))
    found = matching.groups(SWARM, slot, roster, 4, FOUR_ZONES)
    assert sum(len({FOUR_ZONES[p] for p in group}) == 1 for group in found) >= 5
