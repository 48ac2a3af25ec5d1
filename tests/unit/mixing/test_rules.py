"""Every aggregation rule against a closed-form case, without a codec and without a network."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xpeer.manifest.round import Round
from xpeer.mixing import rules
from xpeer.mixing.rules import Rule
from xpeer.mixing.rules.gradient import GradientAveraging

N = 5


def randn(seed: int, n: int = N) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of(rule: str, **changes: float) -> Rule:
    rules_of_all = {"gradient": (1, 0), "diloco": (5, 0)}
    fragments, group = rules_of_all.get(rule, (5, 2))
    return rules.make(Round(rule=rule, fragments=fragments, group=group, **changes))  # type: ignore[arg-type]


def meet(group: Sequence[Rule], thetas: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """All exchange with all, at weight 1/k; the parameters afterwards."""
    sent = [
        rule.outgoing(0, theta).view(rule.vectors, -1)
        for rule, theta in zip(group, thetas, strict=True)
    ]
    mean = torch.stack(sent).mean(0)
    after = []
    for rule, theta, own in zip(group, thetas, sent, strict=True):
        correction = rule.correct(0, theta, own.clone(), mean - own)
        rule.merged(0, correction.state)
        after.append(theta + correction.values)
    return after


@pytest.mark.parametrize("name", ["gossip", "fedavg", "dynamic", "asynchronous"])
def test_averaging_gives_the_mean(name: str) -> None:
    thetas = [randn(1), randn(2), randn(3)]
    for theta in meet([of(name) for _ in thetas], thetas):
        assert torch.allclose(theta, torch.stack(thetas).mean(0))


def test_diloco_is_nesterov_on_the_mean_difference() -> None:
    """Against torch's own SGD with the pseudo-gradient as gradient."""
    start, alpha, mu = randn(0), 0.6, 0.8
    reference = torch.nn.Parameter(start.clone())
    sgd = torch.optim.SGD([reference], lr=alpha, momentum=mu, nesterov=True)
    group = [of("diloco", outer_rate=alpha, outer_momentum=mu) for _ in range(3)]
    for rule in group:
        rule.begin(0, start)
    thetas = [start.clone() for _ in group]
    for window in range(4):
        thetas = [theta + 0.1 * randn(10 * window + i) for i, theta in enumerate(thetas)]
        reference.grad = reference.detach() - torch.stack(thetas).mean(0)
        sgd.step()
        thetas = meet(group, thetas)
        for theta in thetas:
            assert torch.allclose(theta, reference.detach())


def test_diloco_without_momentum_at_rate_one_is_fedavg() -> None:
    group = [of("diloco", outer_rate=1.0, outer_momentum=0.0) for _ in range(2)]
    for rule in group:
        rule.begin(0, randn(0))
    thetas = [randn(1), randn(2)]
    for theta in meet(group, thetas):
        assert torch.allclose(theta, (thetas[0] + thetas[1]) / 2)


def test_a_peer_that_missed_an_outer_step_is_pulled_back() -> None:
    group = [of("diloco", outer_rate=1.0, outer_momentum=0.0) for _ in range(3)]
    for rule in group:
        rule.begin(0, randn(0))
    thetas = [randn(i) for i in (1, 2, 3)]
    thetas[:2] = meet(group[:2], thetas[:2])  # the third is away
    first, *others = meet(group, thetas)
    assert all(torch.allclose(first, other) for other in others)


@given(st.integers(0, 2**31))
@settings(max_examples=20)
def test_noloco_is_its_authors_rule(seed: int) -> None:
    alpha, mu, gamma = 0.7, 0.5, 0.9
    group = [
        of("noloco", outer_rate=alpha, outer_momentum=mu, consensus_rate=gamma) for _ in range(2)
    ]
    phis, velocities = [randn(seed), randn(seed + 1)], [torch.zeros(N).double()] * 2
    for rule, phi in zip(group, phis, strict=True):
        rule.begin(0, phi)
    for window in range(3):
        thetas = [phi + 0.1 * randn(seed + 7 * window + i) for i, phi in enumerate(phis)]
        delta = sum(theta - phi for theta, phi in zip(thetas, phis, strict=True)) / 2
        centre = (phis[0] + phis[1]) / 2
        velocities = [
            mu * velocity + alpha * delta + gamma * (centre - phi)
            for velocity, phi in zip(velocities, phis, strict=True)
        ]
        phis = [phi + velocity for phi, velocity in zip(phis, velocities, strict=True)]
        for theta, phi in zip(meet(group, thetas), phis, strict=True):
            assert torch.allclose(theta, phi)


def test_gasloc_is_accelerated_gossip() -> None:
    """On two peers without local steps: x+ = x - a (x - mean) + g (x - x_last), mean kept."""
    eta, gamma, alpha = 1.0, 0.3, 0.8
    group = [
        of("gasloc", outer_rate=eta, outer_momentum=gamma, consensus_rate=alpha) for _ in range(2)
    ]
    x = [randn(1), randn(2)]
    last = [value.clone() for value in x]
    for rule, value in zip(group, x, strict=True):
        rule.begin(0, value)
    for _ in range(5):
        mean = (x[0] + x[1]) / 2
        expected = [
            value + alpha * (mean - value) + gamma * (value - before)
            for value, before in zip(x, last, strict=True)
        ]
        last, x = x, meet(group, x)
        for value, wanted in zip(x, expected, strict=True):
            assert torch.allclose(value, wanted)
    assert float((x[0] - x[1]).norm()) < 0.1


def test_gasloc_extrapolates_local_steps() -> None:
    rule = of("gasloc", outer_rate=1.5)
    rule.begin(0, torch.zeros(N))
    assert torch.allclose(rule.outgoing(0, torch.ones(N)), torch.full((N,), 1.5))


@pytest.mark.parametrize("name", ["diloco", "noloco", "gasloc"])
def test_averaging_outside_the_rule_is_no_progress(name: str) -> None:
    """Moved parameters and anchors: the next outer step sees what training did, and no more."""
    moved, still = of(name), of(name)
    start, by, trained = randn(0), randn(1), 0.1 * randn(2)
    moved.begin(0, start)
    still.begin(0, start + by)
    moved.moved(0, by)
    (one,), (other,) = meet([moved], [start + by + trained]), meet([still], [start + by + trained])
    assert torch.allclose(one, other)


@pytest.mark.parametrize("name", ["diloco", "noloco", "gasloc"])
def test_state_survives_a_restart(name: str) -> None:
    before, after = of(name), of(name)
    theta = randn(0)
    before.begin(0, theta)
    (theta,) = meet([before], [theta + randn(1)])
    after.begin(0, theta)
    after.restore(before.state())
    theta = theta + randn(2)
    assert torch.equal(meet([before], [theta])[0], meet([after], [theta])[0])


def test_gradients_are_averaged_and_what_is_dropped_comes_back() -> None:
    rule = GradientAveraging()
    rule.accumulate(torch.tensor([1.0, 2.0]))
    rule.accumulate(torch.tensor([3.0, 2.0]))
    theta = torch.tensor([5.0, 6.0])
    sent = rule.outgoing(0, theta)
    assert sent.tolist() == [2.0, 2.0, 5.0, 6.0]
    coarse = torch.tensor([[1.5, 2.0], [5.0, 6.0]])  # what the codec made of it
    shift = torch.tensor([[0.5, 1.0], [0.25, 0.0]])
    correction = rule.correct(0, theta, coarse, shift)
    assert correction.values.tolist() == [0.25, 0.0]
    rule.merged(0, correction.state)
    assert rule.take().tolist() == [2.0, 3.0]
    rule.accumulate(torch.tensor([1.0, 1.0]))
    assert rule.outgoing(0, theta).tolist()[:2] == [1.5, 1.0]  # 0.5 was left
    assert rule.take().tolist() == [1.0, 1.0]  # nobody came: our own


def test_a_gradient_that_comes_after_its_windows_step_is_not_used_in_the_next_one() -> None:
    """Partners wait until their own deadline, so an exchange may be accepted after our step."""
    theta = torch.tensor([5.0])
    coarse, shift = torch.tensor([[1.5], [5.0]]), torch.tensor([[0.5], [0.25]])
    for began in (False, True):  # whether the next window has a gradient when it is resolved
        rule = GradientAveraging()
        rule.accumulate(torch.tensor([2.0]))
        rule.outgoing(0, theta)
        assert rule.take().tolist() == [2.0]  # nobody came in time
        if began:
            rule.accumulate(torch.tensor([8.0]))
        correction = rule.correct(0, theta, coarse.clone(), shift.clone())
        rule.merged(0, correction.state)
        assert correction.values.tolist() == [0.25]
        assert rule.averaged is None
        if not began:
            rule.accumulate(torch.tensor([8.0]))
        assert rule.outgoing(0, theta).tolist() == [8.5, 5.0]  # 0.5 of 2.0 was left
        assert rule.take().tolist() == [8.0]


def test_gradients_that_come_in_meanwhile_change_no_correction() -> None:
    """The helper computes it while the training thread accumulates."""
    rule, theta, shift = GradientAveraging(), torch.zeros(1), torch.ones(2, 1)
    rule.accumulate(torch.tensor([2.0]))
    own = rule.outgoing(0, theta).view(2, 1)
    for _ in range(2):
        assert [each.tolist() for each in rule.correct(0, theta, own, shift).state] == [[3.0], [0]]
        rule.accumulate(torch.tensor([6.0]))
    rule.begin(0, theta)  # a donor's parameters: the meeting is dropped while it is resolved
    rule.correct(0, theta, own, shift)
