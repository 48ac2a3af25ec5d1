"""Weights of pairs and groups: what is kept, what is bounded, what is refused."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xpeer.errors import PeerError, Reason
from xpeer.weights import QUALITY_SHARES, of_pair
from xpeer.wire.messages import Terms

weights = st.floats(1e-3, 1e3)
losses = st.floats(0, 20)


def terms(weight: float = 1.0, group: float = 2.0, loss: float | None = None, age: float = 0.0):
    return Terms(weight, group, 1, 0, loss_public=loss, loss_age=age)


@given(weights, weights)
def test_a_pairs_weights_add_up_to_one_and_are_bounded(a: float, b: float) -> None:
    ours, theirs = terms(a, a + b), terms(b, a + b)
    w_ij, w_ji = of_pair("tokens", ours, theirs), of_pair("tokens", theirs, ours)
    assert w_ij + w_ji == pytest.approx(1.0)
    assert 0.1 <= w_ij <= 0.9
    if 1 / 9 < a / b < 9:  # what both hold, weighted by their tokens, stays
        assert a * w_ij == pytest.approx(b * w_ji)


@given(st.lists(st.floats(0.5, 2.0), min_size=2, max_size=8))
def test_a_full_group_gets_the_weighted_mean(tokens: list[float]) -> None:
    """FedAvg, McMahan et al. 2017."""
    total, values = sum(tokens), [float(i * i) for i in range(len(tokens))]
    mean = sum(n * x for n, x in zip(tokens, values, strict=True)) / total
    for i, x in enumerate(values):
        shift = sum(
            of_pair("tokens", terms(tokens[i], total), terms(n, total)) * (values[j] - x)
            for j, n in enumerate(tokens)
            if j != i
        )
        assert x + shift == pytest.approx(mean)


@given(st.integers(2, 8), st.data())
def test_equal_weights_keep_the_sum_whoever_is_missing(k: int, data: st.DataObject) -> None:
    values = [float(i * i) for i in range(k)]
    after = list(values)
    for i, j in itertools.combinations(range(k), 2):
        if data.draw(st.booleans()):
            views = [data.draw(st.sampled_from([float(k), float(k - 1)])) for _ in range(2)]
            ours, theirs = terms(1.0, views[0]), terms(1.0, views[1])
            after[i] += of_pair("equal", ours, theirs) * (values[j] - values[i])
            after[j] += of_pair("equal", theirs, ours) * (values[i] - values[j])
    assert sum(after) == pytest.approx(sum(values))
    assert of_pair("equal", terms(1.0, k), terms(1.0, k)) == pytest.approx(1 / k)


@given(losses, losses, st.floats(0, 100))
def test_quality_moves_us_towards_the_better_model_within_bounds(a, b, age) -> None:
    ours, theirs = terms(loss=a), terms(loss=b, age=age)
    w_ij, w_ji = of_pair("quality", ours, theirs), of_pair("quality", theirs, ours)
    assert w_ij + w_ji == pytest.approx(1.0)
    assert QUALITY_SHARES[0] <= w_ij <= QUALITY_SHARES[1]
    assert (w_ij - 0.5) * (a - b) >= 0
    fresh = of_pair("quality", ours, terms(loss=b))
    assert abs(w_ij - 0.5) <= abs(fresh - 0.5) + 1e-12  # what is old counts for less


def test_without_a_measurement_quality_is_equal() -> None:
    assert of_pair("quality", terms(loss=1.0), terms()) == 0.5


@pytest.mark.parametrize("weight", [0.0, -1.0, 1e4, float("nan"), float("inf")])
def test_declared_weights_out_of_bounds_are_refused(weight: float) -> None:
    with pytest.raises(PeerError) as error:
        of_pair("equal", terms(), terms(weight))
    assert error.value.reason == Reason.MALFORMED


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_a_declared_loss_that_is_no_number_is_refused(loss: float) -> None:
    with pytest.raises(PeerError):
        of_pair("quality", terms(loss=1.0), terms(loss=loss))
