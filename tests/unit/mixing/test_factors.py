"""The average of what adapters do, cut back to their rank, against dense decompositions."""

from __future__ import annotations

import pytest
import torch

from tests.unit.mixing.test_misalignment import PAIRS, SIZE, random
from xpeer.mixing.factors import FactorPair, mean_of_products


def products(flat: torch.Tensor) -> list[torch.Tensor]:
    return [b @ a for b, a in (pair.of(flat) for pair in PAIRS)]


def dense_means(vectors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [sum(each) / len(vectors) for each in zip(*map(products, vectors), strict=True)]


def test_it_is_exact_where_the_rank_suffices() -> None:
    vectors = [random(1), random(2)]
    for vector in vectors:  # of rank 2 each, so that their mean has rank 4
        for pair in PAIRS:
            b = vector[pair.b_at : pair.b_at + pair.outputs * pair.rank]
            b.view(pair.outputs, pair.rank)[:, 2:] = 0.0
    averaged = mean_of_products(PAIRS, vectors)
    for got, exact in zip(products(averaged), dense_means(vectors), strict=True):
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("peers", [2, 3, 9])
def test_else_nothing_of_that_rank_is_nearer(peers: int) -> None:
    vectors = [random(seed) for seed in range(peers)]
    averaged, by_factors = mean_of_products(PAIRS, vectors), torch.stack(vectors).mean(0)
    for got, exact, other in zip(
        products(averaged), dense_means(vectors), products(by_factors), strict=True
    ):
        lost = torch.linalg.svdvals(exact)[4:].norm()
        assert float((got - exact).norm()) == pytest.approx(float(lost), rel=1e-4)
        assert float((other - exact).norm()) > 1.05 * float(lost)


def test_other_values_are_averaged_one_by_one() -> None:
    ours = FactorPair(a_at=2, b_at=6, rank=1, inputs=4, outputs=3)
    vectors = [torch.full((12,), 1.0), torch.full((12,), 3.0)]
    averaged = mean_of_products([ours], vectors)
    assert averaged[[0, 1, 9, 10, 11]].tolist() == [2.0] * 5
    b, a = ours.of(averaged)
    torch.testing.assert_close(b @ a, torch.full((3, 4), 5.0).double())  # (1 + 9) / 2
    assert mean_of_products([], vectors).tolist() == [2.0] * 12


def test_adapters_that_do_nothing_yet() -> None:
    start = random(1)
    for pair in PAIRS:
        start[pair.b_at : pair.b_at + pair.outputs * pair.rank] = 0.0
    averaged = mean_of_products(PAIRS, [start, start])
    assert bool(torch.isfinite(averaged).all())
    assert all(float(each.norm()) == 0.0 for each in products(averaged))
    assert averaged.numel() == SIZE
