from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xpeer.errors import PeerError, Reason
from xpeer.forms import Form
from xpeer.mixing.differences import Difference, bounded, difference
from xpeer.mixing.screen import CAP, STALE_SHARE, Limit, NormLimit, Scale
from xpeer.wire.codec import NAMES, decode, encode


def randn(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def at(norm: float) -> Limit:
    """The same limit, whatever our own norm."""
    return lambda _own_norm, z: min(z, norm)


def found(own: torch.Tensor, peer: torch.Tensor, limit: Limit) -> Difference:
    """Of one vector."""
    return difference(Form("float32", own.numel()), own, encode("float32", peer), [limit], 0)


@given(
    codec=st.sampled_from(NAMES),
    distance=st.sampled_from([1e-3, 0.1, 0.9]),
    late=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=80)
def test_mixing_keeps_the_sum(
    codec: str, distance: float, late: tuple[int, int], seed: int
) -> None:
    """Training steps go on between snapshot and merge, for another while on each side."""
    n = 1000
    start = (randn(n, seed), randn(n, seed) + distance * randn(n, seed + 1))
    sent = [encode(codec, theta) for theta in start]
    seen = [decode(Form(codec, n), payload) for payload in sent]
    thetas = [theta.double() for theta in start]
    trained = torch.zeros(n, dtype=torch.float64)
    for side in (0, 1):
        for step in range(late[side]):
            delta = randn(n, seed + 100 * side + step).double() * 0.01
            thetas[side] += delta
            trained += delta
        z = difference(Form(codec, n), seen[side], sent[1 - side], [at(1e3)], 0)
        assert not z.clipped
        thetas[side] += 0.5 * z.values[0].double()
    before = start[0].double() + start[1].double() + trained
    assert torch.allclose(thetas[0] + thetas[1], before, atol=1e-12, rtol=0)


def test_a_fragment_of_zeros_is_mixed_unclipped() -> None:
    z = found(torch.zeros(10), torch.ones(10), NormLimit().of("a", Scale()))
    assert (z.clipped, z.distance) == (False, 1.0)
    assert torch.equal(z.values[0], torch.ones(10))


def test_a_fragment_of_zeros_that_training_moves_is_bounded_by_that() -> None:
    """With one vector, and where a masked group's sum was decoded before."""
    limit = NormLimit().of("a", Scale(moved=1.0))
    for z in (
        found(torch.zeros(10), torch.full((10,), 1e6), limit),
        bounded(torch.full((10,), 1e6), torch.zeros(10), limit),
    ):
        assert z.clipped
        assert float(z.values.norm()) == pytest.approx(CAP)


@pytest.mark.parametrize(
    ("scale", "most"),
    [(Scale(), 10.0), (Scale(stale=True), STALE_SHARE * 10.0), (Scale(0.1), CAP * 0.1)],
)
def test_while_a_vector_of_ours_is_zero_the_parameters_bound_it(scale: Scale, most: float) -> None:
    """A movement before our first step is zero; so is a gradient of nothing."""
    limits = [NormLimit(of_differences=not at).of("a", scale) for at in (0, 1)]
    own = torch.cat((torch.zeros(100), torch.ones(100)))  # the parameters' norm is 10
    for sent in (1e-3, 1e3, 1e30):
        peer = torch.cat((torch.full((100,), sent), torch.ones(100)))
        z = difference(Form("float32", 200), own, encode("float32", peer), limits, parameters_at=1)
        assert z.norms[0] == pytest.approx(min(10 * sent, most), rel=1e-5)
        assert float(z.values[0].norm()) == pytest.approx(z.norms[0], rel=1e-5)
        assert z.clipped == (sent > 1)


def test_a_difference_that_overflows_is_refused() -> None:
    big = torch.full((4,), 3e38)
    with pytest.raises(PeerError) as error:
        found(-big, big, at(1.0))
    assert error.value.reason == Reason.NOT_FINITE


def test_vectors_are_clipped_one_by_one_and_the_distance_is_the_parameters() -> None:
    own, limits = torch.ones(2, 100), [at(4.0), at(1e3)]
    peer = torch.stack([torch.full((100,), 9.0), torch.full((100,), 3.0)])
    z = difference(
        Form("float32", own.numel()),
        own.view(-1),
        encode("float32", peer.view(-1)),
        limits,
        parameters_at=1,
    )
    assert z.norms == pytest.approx((4.0, 20.0))
    assert float(z.values[0].norm()) == pytest.approx(4.0)
    assert torch.equal(z.values[1], torch.full((100,), 2.0))
    assert z.clipped
    assert z.distance == pytest.approx(2.0)
