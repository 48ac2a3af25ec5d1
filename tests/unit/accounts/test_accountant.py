from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xpeer.accounts.accountant import (
    Segment,
    _Search,
    calibrate,
    default_delta,
    epsilon,
    epsilon_rdp,
    merge,
    steps_within,
)
from xpeer.errors import ConfigError, LocalError

# sigma, q, steps, delta, epsilon by RDP, epsilon by PLD. RDP agrees with opacus 1.6's
# RDPAccountant to four digits, PLD with its PRVAccountant to 0.6%.
REFERENCE = [
    (1.0, 0.01, 1000, 1e-5, 2.1014, 1.8282),
    (0.6, 0.004, 5000, 1e-6, 8.3325, 7.2874),
    (2.0, 0.05, 2000, 1e-5, 5.9242, 5.4717),
    (1.0, 1.0, 10, 1e-5, 19.0536, 17.8566),
    (4.0, 1.0, 50, 1e-5, 9.2350, 8.5959),
]


@pytest.mark.parametrize(("sigma", "q", "steps", "delta", "by_rdp", "by_pld"), REFERENCE)
def test_reference_values(
    sigma: float, q: float, steps: int, delta: float, by_rdp: float, by_pld: float
) -> None:
    segments = [Segment(sigma, q, steps)]
    assert epsilon_rdp(segments, delta) == pytest.approx(by_rdp, abs=1e-4)
    assert epsilon(segments, delta) == pytest.approx(by_pld, abs=3e-4)


def test_a_gaussian_step_without_sampling_has_the_exact_cost() -> None:
    """Balle & Wang 2018, theorem 8: delta of one Gaussian mechanism in closed form."""
    sigma, delta = 2.0, 1e-5
    eps = epsilon([Segment(sigma, 1.0, 1)], delta)

    def phi(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    a, b = 0.5 / sigma, eps * sigma
    assert phi(a - b) - math.exp(eps) * phi(-a - b) == pytest.approx(delta, rel=2e-2)


@pytest.mark.parametrize(("sigma", "steps"), [(30.0, 1000), (100.0, 100_000)])
@pytest.mark.parametrize("delta", [1e-8, 1e-10, 1e-12, 1e-14])
def test_a_small_delta_is_never_overstepped(sigma: float, steps: int, delta: float) -> None:
    """The same closed form: steps without sampling are one with less noise."""
    eps = epsilon([Segment(sigma, 1.0, steps)], delta)
    together = sigma / math.sqrt(steps)
    a, b = 0.5 / together, eps * together
    log_tail = math.log(math.erfc((a + b) / math.sqrt(2)) / 2 or 5e-324)
    assert math.erfc((b - a) / math.sqrt(2)) / 2 - math.exp(eps + log_tail) <= delta


@given(
    st.floats(0.5, 4.0), st.floats(0.001, 0.2), st.integers(1, 400), st.sampled_from([1e-5, 1e-7])
)
@settings(max_examples=6)
def test_the_tight_bound_is_below_the_loose_one_and_grows_with_steps(
    sigma: float, q: float, steps: int, delta: float
) -> None:
    now = epsilon([Segment(sigma, q, steps)], delta)
    more = epsilon([Segment(sigma, q, steps + 1)], delta)
    assert now <= more + 1e-9
    assert now <= epsilon_rdp([Segment(sigma, q, steps)], delta) + 1e-3


def test_more_noise_and_less_sampling_cost_less() -> None:
    cost = epsilon([Segment(1.0, 0.02, 100)], 1e-5)
    assert epsilon([Segment(1.1, 0.02, 100)], 1e-5) < cost
    assert epsilon([Segment(1.0, 0.019, 100)], 1e-5) < cost
    assert epsilon([Segment(1.0, 0.02, 100)], 1e-6) > cost


def test_little_noise_needed_is_found_quickly() -> None:
    """Half a million steps fit; the library's own way would compute powers of that size."""
    found = steps_within(8.0, 1e-5, [], 2.0, 4 / 500, 10_000_000)
    assert epsilon([Segment(2.0, 4 / 500, found)], 1e-5) <= 8.0
    assert epsilon([Segment(2.0, 4 / 500, found + found // 100)], 1e-5) > 8.0


def test_segments_add_up_whatever_their_order() -> None:
    a, b = Segment(1.0, 0.01, 300), Segment(0.8, 0.02, 200)
    together = epsilon([a, b], 1e-5)
    assert epsilon([b, Segment(1.0, 0.01, 100), Segment(1.0, 0.01, 200)], 1e-5) == pytest.approx(
        together, rel=1e-9
    )
    assert max(epsilon([a], 1e-5), epsilon([b], 1e-5)) < together
    assert together < epsilon([a], 5e-6) + epsilon([b], 5e-6)
    assert merge([a, b, a]) == [Segment(1.0, 0.01, 600), b]


def test_nothing_costs_nothing() -> None:
    assert epsilon([], 1e-5) == 0.0
    assert epsilon_rdp([], 1e-5) == 0.0
    assert epsilon([Segment(1.0, 0.01, 0)], 1e-5) == 0.0


def test_hopeless_costs_are_large_numbers_and_quick() -> None:
    assert epsilon([Segment(0.001, 1.0, 1)], 1e-5) > 1000
    assert epsilon([Segment(1e-200, 1.0, 1)], 1e-5) == math.inf
    assert epsilon([Segment(1.0, 1.0, 10**9)], 1e-5) > 1000


@pytest.mark.parametrize(
    ("target", "delta", "q", "steps"),
    [(8.0, 1e-5, 0.05, 500), (2.0, 1e-6, 0.01, 1000), (0.1, 1e-5, 0.01, 100), (8.0, 1e-5, 1.0, 20)],
)
def test_calibrated_noise_is_enough_and_a_thousandth_less_is_not(
    target: float, delta: float, q: float, steps: int
) -> None:
    sigma = calibrate(target, delta, q, steps)
    assert sigma == round(sigma, 3)
    assert epsilon([Segment(sigma, q, steps)], delta) <= target
    assert epsilon([Segment(sigma - 0.001, q, steps)], delta) > target
    assert steps_within(target, delta, [], sigma, q, 100 * steps) >= steps


def test_an_unreachable_target_is_refused() -> None:
    with pytest.raises(ConfigError, match="can't be reached"):
        calibrate(1e-6, 1e-12, 1.0, 100)


def test_steps_within_is_the_last_step_that_fits() -> None:
    target, delta, sigma, q = 3.0, 1e-5, 0.8, 0.01
    spent = [Segment(1.2, 0.02, 300)]
    steps = steps_within(target, delta, spent, sigma, q, 10**7)
    assert 0 < steps < 10**7
    assert epsilon([*spent, Segment(sigma, q, steps)], delta) <= target
    assert epsilon([*spent, Segment(sigma, q, steps + 1)], delta) > target


def test_steps_within_is_the_same_after_a_part_was_spent() -> None:
    """A restart asks again, and must neither lose nor gain steps."""
    target, delta, sigma, q = 4.0, 1e-5, 0.9, 0.02
    whole = steps_within(target, delta, [], sigma, q, 10**6)
    for done in (1, whole // 3, whole):
        left = steps_within(target, delta, [Segment(sigma, q, done)], sigma, q, 10**6)
        assert left == whole - done


def test_steps_within_ends_at_its_limit_and_at_the_budget() -> None:
    assert steps_within(8.0, 1e-5, [], 1.0, 0.01, 7) == 7
    assert steps_within(8.0, 1e-5, [], 1.0, 0.01, 0) == 0
    assert steps_within(8.0, 1e-5, [Segment(0.5, 1.0, 10)], 1.0, 0.01, 100) == 0
    assert steps_within(0.01, 1e-5, [], 0.3, 1.0, 100) == 0


def test_default_delta() -> None:
    assert default_delta(1) == 1e-5
    assert default_delta(10**6) == pytest.approx(10**-6.6)
    assert default_delta(10**12) == 1e-10
    with pytest.raises(LocalError):
        default_delta(0)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf])
def test_impossible_noise_is_refused(sigma: float) -> None:
    with pytest.raises(LocalError, match="noise multiplier"):
        Segment(sigma, 0.1, 1)


@pytest.mark.parametrize("q", [0.0, -0.1, 1.0001, math.nan])
def test_impossible_sampling_is_refused(q: float) -> None:
    with pytest.raises(LocalError, match="sampling probability"):
        Segment(1.0, q, 1)


@pytest.mark.parametrize("steps", [-1, 1.5, True, "3"])
def test_impossible_steps_are_refused(steps: Any) -> None:
    with pytest.raises(LocalError, match="steps"):
        Segment(1.0, 0.1, steps)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_impossible_deltas_are_refused(delta: float) -> None:
    for ask in (epsilon, epsilon_rdp):
        with pytest.raises(LocalError, match="delta"):
            ask([Segment(1.0, 0.1, 1)], delta)
    with pytest.raises(LocalError, match="delta"):
        calibrate(1.0, delta, 0.1, 10)
    with pytest.raises(LocalError, match="delta"):
        steps_within(1.0, delta, [], 1.0, 0.1, 10)


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
def test_impossible_targets_are_refused(target: float) -> None:
    with pytest.raises(LocalError, match="epsilon"):
        calibrate(target, 1e-5, 0.1, 10)
    with pytest.raises(LocalError, match="epsilon"):
        steps_within(target, 1e-5, [], 1.0, 0.1, 10)


@given(data=st.data())
def test_a_search_finds_the_last_number_within_the_target(data: st.DataObject) -> None:
    """Whatever shape the cost has that rises, in either direction, from any start."""
    end = data.draw(st.integers(1, 10**6))
    last = data.draw(st.integers(0, end - 1))
    start = data.draw(st.integers(0, last))
    power = data.draw(st.sampled_from([0.1, 0.5, 1.0, 2.0, 10.0]))
    rise = data.draw(st.sampled_from([None, 1e-9, 1.0, 1e9]))
    down = data.draw(st.booleans())
    infinite = data.draw(st.integers(last + 1, end))
    tried = []

    def cost(number: int) -> float:
        tried.append(number)
        ahead = end - number if down else number
        return math.inf if ahead >= infinite else float((ahead + 0.5) ** power)

    target = float((last + 1.0) ** power)
    ends = (end - start, 0) if down else (start, end)
    found = _Search(target, cost, *ends, rise).last_within()
    assert found == (end - last if down else last)
    assert len(tried) < 90
    assert ends[1] not in tried
