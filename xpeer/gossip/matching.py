"""Who meets whom in a slot: a pure function of (swarm, slot, roster); no negotiation, no leader.

A slot's groups (pairs are groups of two) come out of passes. A pass orders the members that are
still free around a ring, drawn anew for every slot and pass; k neighbours are a window, and every
window has a rank. A window that ranks before all that overlap it becomes a group. That takes 2/3 of
the members in a pass at k = 2, so a handful of passes suffices, and each costs a sort: 1 ms for
256 members, 8 ms for 4096. All is 64-bit integer arithmetic on keys hashed from the PeerIDs: the
same on every machine.

Properties, each with a test:
- Perfect: with an even number of members everybody is paired, with an odd number one is left over.
- Uniform: in the long run every pair meets equally often.
- Local: a member that one of us does not know of changes, on average over slots, 1.2 of 3 other
  pairs (eight members), 2.4 of 15 (32), 4 of 127 (256) and 7 of 2047 (4096); of groups of four 5 of
  7 (32) and 19 of 63 (256). All others are the same at both.
- Above four members, who met in one of the last two slots is not paired while there is another way.
  History is computed, never stored, and starts anew at every block of slots, so that it is the same
  at every peer whenever it began. In blocks of 8, 0.02 of the pairs of five members (0.06 of eight)
  meet again in the next slot, against 0.2 (0.14) without avoidance.
- In one of every two slots (drawn by hash) members of the same zone are matched first; the other
  stays uniform, so that the mean mixing matrix keeps at least half of its spectral gap, whatever
  the zones are, and the swarm its rate of consensus to a factor of two (Boyd et al. 2006,
  "Randomized gossip algorithms", theorem 3).

Keys of two of N members collide with probability N^2 / 2^65 (5e-13 at N = 4096), ranks of two
windows of a pass with N^2 / 2^49; a collision is settled by the order of the PeerIDs, and costs
nothing but agreement with a peer whose roster differs. The mix is public and not cryptographic:
nothing is secret here, and an identity made by trial may be favoured in slots chosen beforehand.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Mapping

import numpy as np
import numpy.typing as npt

from xpeer.identity import PeerId

AVOIDED_SLOTS = 2
"""Slots whose pairs are matched last, ..."""
AVOID_ABOVE = 4
"""... when there are more members than this."""
HISTORY_SLOTS = 8
"""Length of a block of slots; its first slot knows of no earlier one."""
MAX_GROUP = 8
PATIENCE = 3
"""Passes without a group before avoidance, or the preference for zones, is given up."""
_INDEX_BITS = np.uint64(16)
_NEVER = np.uint64(0xFFFF_FFFF_FFFF_FFFF)

Pair = tuple[PeerId, PeerId]
Group = tuple[PeerId, ...]
_Words = npt.NDArray[np.uint64]
_Indices = npt.NDArray[np.int64]


def slot_number(now_s: float, slot_s: float) -> int:
    """The slot of the shared clock."""
    return int(now_s // slot_s)


def fragment_of(swarm_id: str, slot: int, fragments: int) -> int:
    """Which fragment a slot exchanges.

    Every F slots visit every fragment once, in an order drawn anew: with a fixed order, a step that
    takes a multiple of F slots would meet the same fragment for ever.
    """
    cycle, position = divmod(slot, fragments)
    return _fragments_of(swarm_id, cycle, fragments)[position]


@functools.lru_cache(maxsize=64)
def _fragments_of(swarm_id: str, cycle: int, fragments: int) -> list[int]:
    return sorted(range(fragments), key=lambda f: _hash(swarm_id, "fragment", cycle, str(f)))


def prefers_zones(swarm_id: str, slot: int) -> bool:
    """Whether this slot matches members of the same zone first: one of every two slots."""
    return _hash(swarm_id, "zone", slot // 2) % 2 == slot % 2


def partner(
    swarm_id: str,
    slot: int,
    roster: Collection[PeerId],
    me: PeerId,
    zones: Mapping[PeerId, str] | None = None,
) -> list[PeerId]:
    """Our partner of this slot, then the next best.

    Returns:
        Empty if nobody is left for us in this slot's matching. Otherwise the matched partner,
        followed by the other members in the order of their rank (our zone first where the slot
        prefers zones), as fallbacks.
    """
    mine = group(swarm_id, slot, roster, me, 2, zones)
    if not mine:
        return []
    members = tuple(sorted(set(roster)))
    keys = _slot_keys(swarm_id, slot, members)
    ranks = _mix(keys + keys[members.index(me)])
    if zones and zones.get(me) and prefers_zones(swarm_id, slot):
        far = np.array([zones.get(peer) != zones[me] for peer in members], dtype=np.bool_)
        order = np.lexsort((ranks, far))
    else:
        order = np.argsort(ranks, kind="stable")
    ranked = (members[i] for i in order.tolist())
    return [mine[0], *(peer for peer in ranked if peer not in (me, mine[0]))]


def matching(
    swarm_id: str,
    slot: int,
    roster: Collection[PeerId],
    zones: Mapping[PeerId, str] | None = None,
) -> list[Pair]:
    """Disjoint pairs of this slot; one member stays alone if their number is odd."""
    return [(one, other) for one, other in groups(swarm_id, slot, roster, 2, zones)]


def group(
    swarm_id: str,
    slot: int,
    roster: Collection[PeerId],
    me: PeerId,
    k: int,
    zones: Mapping[PeerId, str] | None = None,
) -> list[PeerId]:
    """The other members of our group of this slot; empty if we are alone."""
    ours = (g for g in groups(swarm_id, slot, roster, k, zones) if me in g)
    return [peer for peer in next(ours, ()) if peer != me]


def groups(
    swarm_id: str,
    slot: int,
    roster: Collection[PeerId],
    k: int,
    zones: Mapping[PeerId, str] | None = None,
) -> list[Group]:
    """Disjoint groups of k members of this slot, each in the order of PeerIDs.

    Every two of a group exchange, and merge with weight 1/k each: all of a complete group then hold
    its mean, and since each pair's two merges cancel, the mean of the swarm is kept whoever is
    missing, and where k does not divide the number of members: the rest, if there are two or more,
    is the last and smaller group.

    Args:
        swarm_id: seeds everything.
        slot: of the shared clock.
        roster: members, in any order.
        k: 2 to 8; 0 = all together.
        zones: labels that operators declare; "" and unlisted are near nobody.

    Raises:
        ValueError: another k.
    """
    if k != 0 and not 2 <= k <= MAX_GROUP:
        raise ValueError(f"groups of {k}: 2 to {MAX_GROUP}, or 0 for all")
    members = tuple(sorted(set(roster)))
    if k == 0 or len(members) < 2:
        return [members] if len(members) > 1 else []
    labels = tuple(zones.get(peer, "") for peer in members) if zones and any(zones.values()) else ()
    drawn = _drawn(swarm_id, slot, members, k, labels)
    return [tuple(members[i] for i in sorted(row) if i >= 0) for row in drawn.tolist()]


@functools.lru_cache(maxsize=4 * HISTORY_SLOTS)
def _drawn(
    swarm_id: str, slot: int, members: tuple[PeerId, ...], k: int, labels: tuple[str, ...]
) -> _Indices:
    """Groups as (groups, k) indices of members; a smaller last one is filled up with -1."""
    recent: list[_Indices] = []
    if len(members) > max(AVOID_ABOVE, k):
        start = slot - slot % HISTORY_SLOTS
        for earlier in range(max(start, slot - AVOIDED_SLOTS), slot):
            drawn = _drawn(swarm_id, earlier, members, k, labels)
            recent.append(_numbers_of(drawn, len(members)))
    zones: _Indices | None = None
    if labels and prefers_zones(swarm_id, slot):
        names = sorted(set(labels))
        zones = np.array([names.index(label) if label else -1 for label in labels], dtype=np.int64)
    return _passes(_slot_keys(swarm_id, slot, members), k, recent, zones)


def _numbers_of(drawn: _Indices, num_members: int) -> _Indices:
    """The group's number of every member, (members,); members without one get numbers of their own
    that are never equal.
    """
    number_of = -1 - np.arange(num_members, dtype=np.int64)
    for column in drawn.T:
        present = np.flatnonzero(column >= 0)
        number_of[column[present]] = present
    return number_of


def _passes(
    keys: _Words,  # (members,), of this slot
    k: int,
    recent: list[_Indices],  # each (members,): who shares a number met
    zones: _Indices | None,  # (members,): number of the zone, -1 = none
) -> _Indices:
    free = np.arange(len(keys))
    rows: list[_Indices] = []
    fruitless = number = 0
    while len(free) > 1:
        number += 1
        place = _mix(keys[free] + np.uint64(number))
        if zones is None:
            order = free[np.argsort(place, kind="stable")]
        else:  # zones lie together
            zone_place = _mix(np.uint64(number) + zones[free].astype(np.uint64) + keys[0])
            order = free[np.lexsort((place, zone_place))]
        size = min(k, len(order))
        starts = np.arange(len(order) if len(order) > size else 1)
        windows = order[(starts[:, None] + np.arange(size)) % len(order)]
        allowed = np.ones(len(windows), dtype=bool)
        for number_of in recent:
            allowed &= _all_differ(number_of[windows])
        if zones is not None:
            theirs = zones[windows]
            allowed &= (theirs[:, 0] >= 0) & (theirs == theirs[:, :1]).all(axis=1)
        first = _first_of_all(_mix(keys[windows].sum(axis=1)), allowed, size)
        if not first.any():
            fruitless += 1
            if fruitless == PATIENCE:
                fruitless = 0
                if zones is not None:
                    zones = None
                else:
                    recent = []
            continue
        rows.append(np.pad(windows[first], ((0, 0), (0, k - size)), constant_values=-1))
        grouped = np.zeros(len(keys), dtype=bool)
        grouped[windows[first]] = True
        free = free[~grouped[free]]
    return np.concatenate(rows)


def _first_of_all(
    ranks: _Words, allowed: npt.NDArray[np.bool_], size: int
) -> npt.NDArray[np.bool_]:
    """Which windows are allowed and rank before all allowed ones that overlap them."""
    unique = (ranks >> _INDEX_BITS << _INDEX_BITS) | np.arange(len(ranks), dtype=np.uint64)
    unique[~allowed] = _NEVER
    if len(unique) == 1:
        return allowed
    reach = size - 1  # windows that overlap lie within this distance on the ring
    ring = np.concatenate((unique[-reach:], unique, unique[:reach]))
    best = unique.copy()
    for shift in (*range(reach), *range(reach + 1, 2 * reach + 1)):
        np.minimum(best, ring[shift : shift + len(unique)], out=best)
    return np.asarray((unique == best) & allowed, dtype=np.bool_)


def _all_differ(numbers: _Indices) -> npt.NDArray[np.bool_]:
    """Which rows hold no number twice."""
    ordered = np.sort(numbers, axis=1)
    return np.asarray((ordered[:, 1:] != ordered[:, :-1]).all(axis=1), dtype=np.bool_)


def _slot_keys(swarm_id: str, slot: int, members: tuple[PeerId, ...]) -> _Words:
    seed = np.uint64(_hash(swarm_id, "slot", slot))
    return _mix(_keys_of(swarm_id, members) ^ seed)


@functools.lru_cache(maxsize=64)
def _keys_of(swarm_id: str, members: tuple[PeerId, ...]) -> _Words:
    return np.array([_key_of(swarm_id, peer) for peer in members], dtype=np.uint64)


@functools.lru_cache(maxsize=1 << 14)
def _key_of(swarm_id: str, peer: PeerId) -> int:
    return _hash(swarm_id, "peer", 0, peer)


def _mix(words: _Words) -> _Words:
    """SplitMix64 (Steele et al. 2014, figure 17): a bijection of 64-bit words."""
    z = words + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


def _hash(swarm_id: str, purpose: str, number: int, part: str = "") -> int:
    """64 bits, by BLAKE2b."""
    data = f"{purpose}\0{number}\0{part}".encode()
    return int.from_bytes(
        hashlib.blake2b(data, digest_size=8, key=bytes.fromhex(swarm_id)).digest(), "big"
    )
