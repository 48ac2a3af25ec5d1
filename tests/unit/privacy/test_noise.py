from __future__ import annotations

import copy
import math
import os
import pickle
from collections.abc import Callable

import pytest
import torch

from xpeer.errors import LocalError
from xpeer.privacy.noise import SecretGenerator

# The bounds are six standard deviations of each statistic or more: a sound generator fails one of
# these tests less than once in a million runs, though nothing here has a seed.
MANY = 200_000


def normals(count: int = MANY, std: float = 1.0) -> torch.Tensor:
    return SecretGenerator().gaussian_(torch.empty(count, dtype=torch.float64), std)


@pytest.mark.parametrize("std", [1.0, 1e-4, 300.0])
def test_moments(std: float) -> None:
    z = normals(std=std) / std
    assert abs(float(z.mean())) < 6 / math.sqrt(MANY)
    assert abs(float(z.var()) - 1) < 6 * math.sqrt(2 / MANY)
    assert abs(float((z**3).mean())) < 8 * math.sqrt(15 / MANY)
    assert abs(float((z**4).mean()) - 3) < 8 * math.sqrt(96 / MANY)


def test_distribution() -> None:
    """Kolmogorov-Smirnov: P(D > 3.2 / sqrt(n)) is about 2 exp(-2 * 3.2^2) = 3e-9."""
    z = normals().sort().values
    exact = 0.5 * torch.special.erfc(-z / math.sqrt(2))
    steps = torch.arange(MANY + 1, dtype=torch.float64) / MANY
    distance = max(float((exact - steps[:-1]).max()), float((steps[1:] - exact).max()))
    assert distance < 3.2 / math.sqrt(MANY)


def test_values_and_draws_are_independent() -> None:
    secret = SecretGenerator()
    a, b = (secret.gaussian_(torch.empty(MANY), 1.0).double() for _ in range(2))
    c = SecretGenerator().gaussian_(torch.empty(MANY), 1.0).double()
    pairs = [(a, b), (a, c), (a[1:], a[:-1]), (a[: MANY // 2], a[MANY // 2 :])]
    for x, y in pairs:
        assert abs(float((x * y).mean())) < 6 / math.sqrt(len(x))
        # a pair of one Box-Muller draw shares its radius: squares would show it
        assert abs(float(((x**2 - 1) * (y**2 - 1)).mean())) < 6 * 2 / math.sqrt(len(x))


def test_every_value_is_drawn_at_any_size() -> None:
    for size in (2, 3, 1001, 131_072, 131_075):
        z = SecretGenerator().gaussian_(torch.full((size,), math.nan).double(), 1.0)
        assert bool(torch.isfinite(z).all())
        assert z.unique().numel() == size


def test_shapes_dtypes_and_views_are_filled_in_place() -> None:
    secret = SecretGenerator()
    whole = torch.zeros(6, 5, dtype=torch.float32)
    part = whole[1:4].T
    assert secret.gaussian_(part, 2.0) is part
    assert bool((whole[1:4] != 0).all())
    assert bool((whole[0] == 0).all())
    assert bool((whole[4:] == 0).all())
    assert secret.gaussian_(torch.empty(0), 1.0).numel() == 0
    assert secret.gaussian_(torch.empty(()), 1.0).shape == ()


def test_torchs_seed_has_no_say() -> None:
    def draw() -> torch.Tensor:
        torch.manual_seed(7)
        return SecretGenerator().gaussian_(torch.empty(8), 1.0)

    assert not torch.equal(draw(), draw())
    torch.manual_seed(7)
    before = torch.get_rng_state()
    SecretGenerator().gaussian_(torch.empty(8), 1.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_bit_is_the_operating_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same bytes from there, and only then, the same noise."""
    monkeypatch.setattr(os, "urandom", lambda count: bytes(range(count)))
    first, second = (SecretGenerator().gaussian_(torch.empty(8), 1.0) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, pickle.dumps],
    ids=["copy", "deepcopy", "pickle"],
)
def test_it_can_neither_be_copied_nor_stored(duplicate: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match="can't be copied"):
        duplicate(SecretGenerator())


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, math.inf])
def test_impossible_noise_is_refused(std: float) -> None:
    tensor = torch.zeros(3)
    with pytest.raises(LocalError, match="standard deviation"):
        SecretGenerator().gaussian_(tensor, std)
    assert bool((tensor == 0).all())


@pytest.mark.parametrize("q", [0.003, 0.25, 0.5, 0.9, 1 / 65536])
def test_each_record_is_sampled_with_its_probability(q: float) -> None:
    chosen = SecretGenerator().poisson_sample(MANY, q)
    spread = math.sqrt(MANY * q * (1 - q))
    assert abs(len(chosen) - MANY * q) < 7 * spread + 7
    assert chosen.dtype == torch.int64
    assert bool((chosen[1:] > chosen[:-1]).all())
    if len(chosen):
        assert 0 <= int(chosen[0]) <= int(chosen[-1]) < MANY


def test_records_are_sampled_independently() -> None:
    """The batch's size varies as a binomial's does, and no record is favoured."""
    secret, n, q, draws = SecretGenerator(), 40, 0.3, 4000
    counts, together = torch.zeros(n), torch.zeros(n, n)
    sizes = []
    for _ in range(draws):
        chosen = torch.zeros(n)
        chosen[secret.poisson_sample(n, q)] = 1.0
        counts += chosen
        together += torch.outer(chosen, chosen)
        sizes.append(float(chosen.sum()))
    assert float((counts - draws * q).abs().max()) < 7 * math.sqrt(draws * q * (1 - q))
    variance = float(torch.tensor(sizes).var())
    assert abs(variance / (n * q * (1 - q)) - 1) < 7 * math.sqrt(2 / draws)
    apart = together[~torch.eye(n, dtype=torch.bool)] - draws * q * q
    assert float(apart.abs().max()) < 7 * math.sqrt(draws * q * q * (1 - q * q))


def test_sampling_at_its_ends() -> None:
    secret = SecretGenerator()
    assert secret.poisson_sample(5, 1.0).tolist() == [0, 1, 2, 3, 4]
    assert secret.poisson_sample(5, 0.0).tolist() == []
    assert secret.poisson_sample(0, 0.5).tolist() == []
    assert secret.poisson_sample(100, 1e-30).tolist() == []


@pytest.mark.parametrize(("n", "q"), [(-1, 0.5), (5, -0.1), (5, 1.1), (5, math.nan)])
def test_impossible_sampling_is_refused(n: int, q: float) -> None:
    with pytest.raises(LocalError, match="sampling"):
        SecretGenerator().poisson_sample(n, q)


def test_the_undecided_records_are_decided_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Just below and at q: 2 bytes that tie, then 6 that decide."""
    q = 0.5 + 2.0**-40
    low = int(2.0**24).to_bytes(6, "little")
    for six, expected in ((int(2.0**24 - 1).to_bytes(6, "little"), [0]), (low, [])):
        answers = {2: (0).to_bytes(2, "little"), 6: six}
        monkeypatch.setattr(os, "urandom", lambda count, answers=answers: answers[count])
        assert SecretGenerator().poisson_sample(1, q).tolist() == expected


def test_shuffled_is_a_permutation() -> None:
    secret = SecretGenerator()
    first, second = secret.shuffled(1000), secret.shuffled(1000)
    assert torch.equal(first.sort().values, torch.arange(1000))
    assert not torch.equal(first, second)
    assert secret.shuffled(0).tolist() == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_noise_on_cuda() -> None:
    secret = SecretGenerator("cuda")
    a, b = (secret.gaussian_(torch.empty(MANY, device="cuda"), 2.0).double() / 2 for _ in range(2))
    assert abs(float(a.var()) - 1) < 6 * math.sqrt(2 / MANY)
    assert abs(float((a * b).mean())) < 6 / math.sqrt(MANY)
