"""Epsilon never falls when more is done to the text: both accountants, any history."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from xpeer.accounts.accountant import Segment, epsilon, epsilon_worst
from xpeer.accounts.replay import EPSILON_ERROR, epsilon_replayed

SIGMAS = st.floats(0.6, 4.0).map(lambda sigma: round(sigma, 2))
RATES = st.sampled_from([0.001, 0.004, 0.01, 0.03, 0.1, 1.0])
SEGMENTS = st.builds(Segment, SIGMAS, RATES, st.integers(1, 200))
DELTA = 1e-5
few = settings(max_examples=6, derandomize=True)


def more(segment: Segment, how: str) -> Segment:
    """Steps, q or 1 / sigma larger."""
    if how == "steps":
        return replace(segment, steps=segment.steps + 7)
    if how == "rate":
        return replace(segment, sampling_probability=min(1.0, 1.3 * segment.sampling_probability))
    return replace(segment, noise_multiplier=segment.noise_multiplier / 1.1)


WAYS = st.sampled_from(["steps", "rate", "noise"])


@few
@given(st.lists(SEGMENTS, min_size=1, max_size=2), WAYS)
def test_the_accountants_epsilon_grows(segments: list[Segment], how: str) -> None:
    before = epsilon(segments, DELTA)
    after = epsilon([more(segments[0], how), *segments[1:]], DELTA)
    # grids differ between kinds of steps, by 1e-4 of epsilon at most
    assert after >= before - 2e-4
    assert epsilon(segments, DELTA / 2) >= before


@few
@given(st.lists(SEGMENTS, min_size=1, max_size=2), WAYS)
def test_the_replayed_epsilon_grows(segments: list[Segment], how: str) -> None:
    before = epsilon_replayed(segments, DELTA)
    after = epsilon_replayed([more(segments[0], how), *segments[1:]], DELTA)
    assert after >= before - 2 * EPSILON_ERROR
    assert epsilon_replayed(segments, DELTA / 2) >= before - 2 * EPSILON_ERROR


@few
@given(st.lists(SEGMENTS, min_size=1, max_size=2), SEGMENTS)
def test_a_further_charge_never_lowers_it(segments: list[Segment], charge: Segment) -> None:
    before = epsilon(segments, DELTA)
    assert epsilon([*segments, charge], DELTA) >= before - 2e-4
    assert epsilon_worst([segments, [charge]], DELTA) >= before
    assert epsilon_worst([], DELTA) == 0.0
