"""The replay of epsilon against the accountant, opacus' PRV accountant and Renyi's bound."""

from __future__ import annotations

import pytest

from benchmarks.privacy.accounting import by_opacus, random_charges
from tests.unit.accounts.test_accountant import REFERENCE
from xpeer.accounts.accountant import Segment, epsilon, epsilon_rdp
from xpeer.accounts.replay import epsilon_replayed, replay
from xpeer.errors import LocalError


@pytest.mark.parametrize(("sigma", "q", "steps", "delta", "by_rdp", "by_pld"), REFERENCE)
def test_the_replay_agrees_with_the_reference(
    sigma: float, q: float, steps: int, delta: float, by_rdp: float, by_pld: float
) -> None:
    found = epsilon_replayed([Segment(sigma, q, steps)], delta)
    assert found == pytest.approx(by_pld, rel=2e-3)
    assert found < by_rdp
    estimate, upper = by_opacus([Segment(sigma, q, steps)], delta)
    assert found == pytest.approx(estimate, rel=0.01)
    assert found <= upper


@pytest.mark.parametrize("seed", range(8))
def test_the_replay_agrees_on_random_charges(seed: int) -> None:
    """`python -m benchmarks.privacy.accounting` does a hundred."""
    segments, delta = random_charges(seed)
    found = epsilon_replayed(segments, delta)
    assert found == pytest.approx(epsilon(segments, delta), rel=0.01, abs=2e-3)
    estimate, upper = by_opacus(segments, delta)
    assert found == pytest.approx(estimate, rel=0.01)
    assert found <= upper
    assert found <= epsilon_rdp(segments, delta)


def test_nothing_costs_nothing_and_kinds_are_merged() -> None:
    assert epsilon_replayed([], 1e-5) == 0.0
    parts = [Segment(1.0, 0.01, 40), Segment(2.0, 0.05, 10), Segment(1.0, 0.01, 60)]
    merged = [Segment(2.0, 0.05, 10), Segment(1.0, 0.01, 100)]
    assert epsilon_replayed(parts, 1e-5) == pytest.approx(epsilon_replayed(merged, 1e-5), rel=1e-6)


def test_what_fits_on_no_grid_is_an_error() -> None:
    with pytest.raises(LocalError, match="grid"):
        epsilon_replayed([Segment(0.001, 1.0, 10)], 1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_the_certain_bounds_hold_the_accountants_epsilon(seed: int) -> None:
    segments, delta = random_charges(seed)
    found = replay(segments, delta)
    assert found.lower < found.estimate < found.upper
    assert found.upper - found.lower < 0.02
    assert found.lower <= epsilon(segments, delta)  # which bounds from above
    assert epsilon(segments, delta) <= found.upper + 2e-3


def test_a_delta_that_doubles_do_not_reach_is_an_error() -> None:
    with pytest.raises(LocalError, match="too small"):
        replay([Segment(1.0, 0.01, 10)], 1e-13)
