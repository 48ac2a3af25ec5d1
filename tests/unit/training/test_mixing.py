from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xpeer.errors import PeerError, Reason
from xpeer.training.mixing import (
    CLIP_AFTER,
    CLIP_FLOOR,
    CLIP_MULTIPLE,
    Difference,
    NormLimit,
    difference,
)
from xpeer.wire.codec import NAMES, decode, encode, is_modulo


def randn(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def found(own: torch.Tensor, peer: torch.Tensor, limit: NormLimit) -> Difference:
    """Of one vector."""
    return difference("float32", own, encode("float32", peer), own.numel(), [limit], 0)


@given(
    codec=st.sampled_from([name for name in NAMES if not is_modulo(name)]),
    distance=st.sampled_from([1e-3, 0.1, 0.9]),
    late=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=80, deadline=None)
def test_mixing_keeps_the_sum(
    codec: str, distance: float, late: tuple[int, int], seed: int
) -> None:
    """Training steps go on between snapshot and merge, for another while on each side."""
    n = 1000
    start = (randn(n, seed), randn(n, seed) + distance * randn(n, seed + 1))
    sent = [encode(codec, theta) for theta in start]
    seen = [decode(codec, payload, n) for payload in sent]
    thetas = [theta.double() for theta in start]
    trained = torch.zeros(n, dtype=torch.float64)
    for side in (0, 1):
        for step in range(late[side]):
            delta = randn(n, seed + 100 * side + step).double() * 0.01
            thetas[side] += delta
            trained += delta
        wide = NormLimit()
        for _ in range(CLIP_AFTER):
            wide.accepted(1e3)
        z = difference(codec, seen[side], sent[1 - side], n, [wide], 0)
        assert not z.clipped
        thetas[side] += 0.5 * z.values[0].double()
    before = start[0].double() + start[1].double() + trained
    assert torch.allclose(thetas[0] + thetas[1], before, atol=1e-12, rtol=0)


def test_a_far_partner_is_clipped_to_a_multiple_of_the_median() -> None:
    own, limit = randn(1000, 1), NormLimit()
    for norm in (1.0, 2.0, 3.0, 2.0, 2.0):
        limit.accepted(norm)
    z = found(own, own - 100 * own, limit)
    assert z.clipped
    assert z.norms[0] == pytest.approx(CLIP_MULTIPLE * 2.0)
    assert float(z.values.norm()) == pytest.approx(CLIP_MULTIPLE * 2.0, rel=1e-4)
    assert z.distance == pytest.approx(100.0, rel=1e-4)


def test_before_there_is_a_median_the_limit_is_our_own_norm() -> None:
    own, limit = randn(1000, 1), NormLimit()
    for _ in range(CLIP_AFTER - 1):
        limit.accepted(1e-6)
    near = found(own, own * 1.9, limit)
    far = found(own, own * 10, limit)
    assert not near.clipped
    assert far.clipped
    assert float(far.values.norm()) == pytest.approx(float(own.norm()), rel=1e-4)


def test_a_median_of_zero_does_not_keep_peers_apart() -> None:
    own, limit = randn(1000, 1), NormLimit()
    for _ in range(10):
        limit.accepted(0.0)
    assert not found(own, own * (1 + 0.9 * CLIP_FLOOR), limit).clipped


def test_a_fragment_of_zeros_is_mixed_unclipped() -> None:
    z = found(torch.zeros(10), torch.ones(10), NormLimit())
    assert (z.clipped, z.distance) == (False, 1.0)
    assert torch.equal(z.values[0], torch.ones(10))


def test_a_difference_that_overflows_is_refused() -> None:
    big = torch.full((4,), 3e38)
    with pytest.raises(PeerError) as error:
        found(-big, big, NormLimit())
    assert error.value.reason == Reason.NOT_FINITE


def test_vectors_are_clipped_one_by_one_and_the_distance_is_the_parameters() -> None:
    own, limits = torch.ones(2, 100), [NormLimit(), NormLimit()]
    for _ in range(CLIP_AFTER):
        limits[0].accepted(1.0)
        limits[1].accepted(1e3)
    peer = torch.stack([torch.full((100,), 9.0), torch.full((100,), 3.0)])
    z = difference(
        "float32",
        own.view(-1),
        encode("float32", peer.view(-1)),
        own.numel(),
        limits,
        parameters_at=1,
    )
    assert z.norms == pytest.approx((CLIP_MULTIPLE, 20.0))
    assert float(z.values[0].norm()) == pytest.approx(CLIP_MULTIPLE)
    assert torch.equal(z.values[1], torch.full((100,), 2.0))
    assert z.clipped
    assert z.distance == pytest.approx(2.0)
