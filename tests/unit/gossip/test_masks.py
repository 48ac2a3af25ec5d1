"""Masks cancel, are never used twice, and hide what they should from any two of four."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl import bindings
from nacl.public import PrivateKey
from scipy import stats

from xpeer.errors import PeerError, Reason
from xpeer.forms import Form
from xpeer.gossip import masks
from xpeer.gossip.masks import Ephemeral
from xpeer.identity import PeerId

SWARM = "ab" * 32
PEERS = [PeerId(f"12D3KooW{letter}") for letter in "ABCDEFGH"]


def slot(n: int = 100) -> masks.Group:
    return masks.Group(SWARM, 7, 2, Form("masked16", n))


class Group:
    """The fresh keys of a group's members."""

    def __init__(self, peers: list[PeerId], of: masks.Group) -> None:
        self.of = of
        self.keys = {peer: Ephemeral() for peer in peers}
        self.roster = of.roster({peer: key.public for peer, key in self.keys.items()})

    def pair_keys(self, me: PeerId) -> dict[PeerId, bytes]:
        return {
            peer: self.keys[me].pair_key(self.of, self.roster, me, peer, theirs.public)
            for peer, theirs in self.keys.items()
            if peer != me
        }

    def masked(
        self, me: PeerId, rings: list[npt.NDArray[np.unsignedinteger]]
    ) -> list[npt.NDArray[np.unsignedinteger]]:
        hidden = [ring.copy() for ring in rings]
        masks.mask(hidden, me, self.pair_keys(me))
        return hidden


# RFC 8439, appendix A.1: key, the 16 bytes of counter and nonce, keystream
CHACHA20 = [
    (
        "00" * 32, "00" * 16,
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    ),
    (
        "00" * 32, "01000000" + "00" * 12,
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("key", "start", "expected"), CHACHA20)
def test_chacha20_of_rfc_8439(key: str, start: str, expected: str) -> None:
    """The vectors' block 0 is where our stream begins, block 1 is its next 64 bytes."""
    ring = np.zeros(32, np.uint32)
    masks._apply([ring], bytes.fromhex(key), np.add)
    block = int.from_bytes(bytes.fromhex(start)[:4], "little")
    assert ring.tobytes()[64 * block : 64 * block + 64].hex() == expected


def test_x25519_of_rfc_7748() -> None:
    """Section 6.1, by the function that pair keys are made with."""
    alice = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    public = "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
    bob = bytes.fromhex("de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f")
    shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    assert bytes(PrivateKey(alice).public_key).hex() == public
    assert bindings.crypto_scalarmult(alice, bob).hex() == shared


@given(
    k=st.integers(3, 8),
    sizes=st.tuples(st.integers(1, 70_000), st.integers(0, 300)),
    wide=st.booleans(),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=25)
def test_masks_cancel_in_the_sum_of_all(
    k: int, sizes: tuple[int, int], wide: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    kinds: list[Any] = [np.uint32] if wide else [np.uint16, np.uint32]
    values: list[list[Any]] = [
        [rng.integers(0, 2 ** (8 * kind().itemsize), size, kind)
         for kind, size in zip(kinds, sizes, strict=False)]
        for _ in range(k)
    ]  # fmt: skip
    group = Group(PEERS[:k], slot())
    hidden = [group.masked(peer, own) for peer, own in zip(PEERS, values, strict=False)]
    for ring in range(len(kinds)):
        expected = np.sum([each[ring] for each in values], axis=0, dtype=kinds[ring])
        assert np.array_equal(
            np.sum([each[ring] for each in hidden], axis=0, dtype=kinds[ring]), expected
        )
        if sizes[ring] > 100:
            assert all(
                not np.array_equal(masked[ring], own[ring])
                for masked, own in zip(hidden, values, strict=True)
            )


def test_both_ends_of_a_pair_derive_one_key_and_every_pair_another() -> None:
    group = Group(PEERS[:4], slot())
    keys = {peer: group.pair_keys(peer) for peer in PEERS[:4]}
    pairs = list(itertools.combinations(PEERS[:4], 2))
    assert all(keys[a][b] == keys[b][a] for a, b in pairs)
    assert len({keys[a][b] for a, b in pairs}) == len(pairs)


def test_a_key_is_bound_to_everything_that_the_roster_says() -> None:
    """The same two fresh keys never give the same stream in another context."""
    a, b, c = PEERS[:3]
    ours, theirs = Ephemeral(), Ephemeral()
    public = {a: ours.public, b: theirs.public, c: Ephemeral().public}
    contexts = [
        slot(), slot(n=101), masks.Group(SWARM, 8, 2, Form("masked16", 100)),
        masks.Group(SWARM, 7, 3, Form("masked16", 100)),
        masks.Group(SWARM, 7, 2, Form("masked32", 100)),
        masks.Group("cd" * 32, 7, 2, Form("masked16", 100)),
    ]  # fmt: skip
    rosters = [each.roster(public) for each in contexts]
    other = {**public, c: Ephemeral().public}
    left = {peer: public[peer] for peer in (a, b)}
    rosters += [slot().roster(other), slot().roster(left)]
    contexts += [slot()] * 2
    assert len(set(rosters)) == len(rosters)
    keys = {
        ours.pair_key(of, roster, a, b, theirs.public)
        for of, roster in zip(contexts, rosters, strict=True)
    }
    assert len(keys) == len(rosters)


def test_a_replayed_key_meets_a_fresh_key_of_ours() -> None:
    """A partner that uses its old key and roster again learns nothing about our old stream."""
    a, b = PEERS[:2]
    replayed, roster = Ephemeral(), b"r" * 32
    first = Ephemeral().pair_key(slot(), roster, a, b, replayed.public)
    second = Ephemeral().pair_key(slot(), roster, a, b, replayed.public)
    assert first != second


@pytest.mark.parametrize("key", [bytes(32), b"\x01" + bytes(31)])
def test_a_degenerate_key_is_refused(key: bytes) -> None:
    with pytest.raises(PeerError, match=Reason.TAMPERED):
        Ephemeral().pair_key(slot(), b"r" * 32, PEERS[0], PEERS[1], key)


def test_commitments_and_echoes_bind() -> None:
    a, b = PEERS[:2]
    base = masks.commitment(b"r" * 32, a, b"payload")
    assert base != masks.commitment(b"r" * 32, a, b"payloae")
    assert base != masks.commitment(b"r" * 32, b, b"payload")
    assert base != masks.commitment(b"s" * 32, a, b"payload")
    heard = masks.echo(b"r" * 32, {a: base, b: b"x" * 32})
    assert heard == masks.echo(b"r" * 32, {b: b"x" * 32, a: base})
    assert heard != masks.echo(b"r" * 32, {a: b"x" * 32, b: base})


# What colluders see

VALUES = 60_000
P_VALUE = 1e-7
"""Of a test that should hold; some hundred of them are made, with fresh keys each time."""


def views(
    inputs: dict[PeerId, npt.NDArray[np.uint16]], colluders: tuple[PeerId, ...]
) -> dict[PeerId, npt.NDArray[np.uint16]]:
    """The honest members' payloads with the colluders' own masks taken off again."""
    group = Group(list(inputs), slot(n=VALUES))
    seen = {}
    for peer, values in inputs.items():
        if peer in colluders:
            continue
        (view,) = group.masked(peer, [values])
        known = {other: key for other, key in group.pair_keys(peer).items() if other in colluders}
        undone = np.zeros_like(view)
        masks.mask([undone], peer, known)
        seen[peer] = np.asarray(view - undone, dtype=np.uint16)
    return seen


def p_values(one: npt.NDArray[np.uint16], other: npt.NDArray[np.uint16]) -> list[float]:
    """Chi-square of two samples being of one distribution, by high bits, low bits, and by how one
    value follows the other."""
    found = []
    for cut in (lambda x: x >> 10, lambda x: x & 63, lambda x: (x[1:] - x[:-1]) >> 10):
        table = np.array([np.bincount(cut(x), minlength=64) for x in (one, other)])
        found.append(float(stats.chi2_contingency(table[:, table.sum(0) > 0]).pvalue))
    return found


def equal_sums() -> list[tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16]]]:
    """Two pairs of inputs with the same sum, as different as can be."""
    flat = np.zeros(VALUES, np.uint16)
    slope = (np.arange(VALUES) % 30_000).astype(np.uint16)
    return [(flat, slope), (slope - np.uint16(777), flat + np.uint16(777))]


@pytest.mark.parametrize("colluders", list(itertools.combinations(PEERS[:4], 2)))
def test_two_of_four_can_not_tell_inputs_of_equal_sum_apart(
    colluders: tuple[PeerId, PeerId],
) -> None:
    honest = [peer for peer in PEERS[:4] if peer not in colluders]
    theirs = {peer: np.full(VALUES, 5, np.uint16) for peer in colluders}
    seen = []
    for inputs in equal_sums():
        seen.append(views({**theirs, **dict(zip(honest, inputs, strict=True))}, colluders))
    for peer in honest:
        assert min(p_values(seen[0][peer], seen[1][peer])) > P_VALUE
        for cut in (seen[0][peer] >> 10, seen[0][peer] & 63):
            assert stats.chisquare(np.bincount(cut, minlength=64)).pvalue > P_VALUE
    sums = [sum(each.values()) for each in seen]
    assert np.array_equal(sums[0], sums[1])  # that much they learn, and it is the same


def test_three_of_four_learn_the_fourth() -> None:
    """c = k - 1: no protection; and the test above would notice."""
    colluders = PEERS[1:4]
    seen = []
    for inputs in equal_sums():
        everybody = {peer: np.zeros(VALUES, np.uint16) for peer in colluders}
        seen.append(views({**everybody, PEERS[0]: inputs[0]}, tuple(colluders))[PEERS[0]])
        assert np.array_equal(seen[-1], inputs[0])
    assert min(p_values(*seen)) < P_VALUE
