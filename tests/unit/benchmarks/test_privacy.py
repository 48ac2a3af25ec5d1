"""The pure parts of the `privacy` benchmark, and tiny runs of its attacks."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.privacy import bounds, lira, setting
from benchmarks.privacy.inversion import _perceptron_inputs, _read, _spanned, _tokens
from benchmarks.privacy.plan import RATES, Plan
from benchmarks.privacy.swarm import ReceivedFragment, Swarm
from benchmarks.privacy.utility import Utility, model_with
from benchmarks.privacy.whitebox import RECORDS, Whitebox
from benchmarks.privacy.work import Job, Kept
from xpeer.privacy.mechanism import OffMechanism
from xpeer.training.flat import read_flat
from xpeer.training.losses import record_losses
from xpeer.training.model import build


def test_a_rate_is_bounded_as_clopper_and_pearson_say():
    assert bounds.at_most(0, 100, 0.05) == pytest.approx(1 - 0.05 ** (1 / 100))
    assert bounds.at_most(100, 100, 0.05) == 1.0
    upper = bounds.at_most(10, 100, 0.01)
    assert stats.binom.cdf(10, 100, upper) == pytest.approx(0.01)


def test_rates_of_randomised_response_give_its_epsilon():
    lie = 1 / (1 + math.exp(2.0))
    assert bounds.epsilon_of_rates(lie, lie, 0.0) == pytest.approx(2.0)
    assert bounds.epsilon_of_rates(0.5, 0.5, 1e-5) == 0.0
    assert bounds.epsilon_of_rates(0.01, 0.5, 0.0) == bounds.epsilon_of_rates(0.5, 0.01, 0.0)


def test_the_family_finds_the_sigma_of_a_gaussian_from_exact_rates():
    """q = 1, T = 4: a test of two Gaussians at distance mu = 2 / sigma has exactly such rates."""
    family = bounds.Family(1.0, 4, 1e-5)
    mu = 2 / 1.5
    errors = float(stats.norm.cdf(-mu / 2))  # the threshold half-way
    found, truth = family.epsilon(errors, errors), family.epsilon_of(1.5)
    assert found == pytest.approx(truth, rel=0.03)
    assert found <= truth * 1.001
    assert family.epsilon(0.5, 0.5) == 0.0
    assert family.allows(1.5, errors + 1e-3, errors + 1e-3)
    assert not family.allows(1.7, errors, errors)


def test_one_run_bounds_as_in_the_paper():
    """Without delta it is a binomial test of randomised response."""
    p = bounds.one_run_p_value(1000, 100, 80, 1.0, 0.0)
    assert p == pytest.approx(float(stats.binom.sf(79, 100, 1 / (1 + math.exp(-1.0)))))
    assert bounds.one_run_p_value(1000, 100, 80, 1.0, 1e-5) > p
    found = bounds.one_run_epsilon(1000, 100, 100, 1e-5, error=0.05)
    assert found == pytest.approx(-math.log(0.05 ** (-1 / 100) - 1), rel=0.05)
    assert bounds.one_run_epsilon(1000, 100, 50, 1e-5) == 0.0
    with pytest.raises(ValueError, match="guesses"):
        bounds.one_run_p_value(10, 11, 5, 1.0, 0.0)


def test_one_run_bounds_are_broken_no_more_often_than_stated():
    """Randomised response at its own epsilon, the hardest case: at most 0.001 of the runs."""
    rng = np.random.default_rng(0)
    broken = 0
    for _ in range(300):
        included = rng.random(200) < 0.5
        told = included ^ (rng.random(200) > 1 / (1 + math.exp(-1.0)))
        broken += bounds.one_run_audit(told + 1e-3 * rng.random(200), included, 1e-5) > 1.0
    assert broken <= 4  # five or more: 1e-5 if the bound holds


def test_exposure_counts_candidates_that_are_likelier():
    others = np.arange(1.0, 512.0)
    assert bounds.exposure(0.5, others) == 9.0
    assert bounds.exposure(600.0, others) == 0.0


def test_area_and_found():
    members, others = np.array([3.0, 2.0, 1.0]), np.array([0.0, 2.5])
    assert bounds.area(members, others) == pytest.approx(4 / 6)
    assert bounds.found_at(np.arange(100.0), np.arange(100.0) - 50) == pytest.approx(0.5)


def test_ratios_use_what_a_record_does_in_other_runs():
    """Records differ far more from one another than membership changes them: levels are no help."""
    rng = np.random.default_rng(1)
    included = rng.random((6, 400)) < 0.5
    level = 5 * rng.standard_normal(400)
    losses = level - 0.5 * included + 0.3 * rng.standard_normal((6, 400))
    plain = bounds.area(-losses[included], -losses[~included])
    ratios = lira.ratios(losses, included)
    assert bounds.area(ratios[included], ratios[~included]) > plain + 0.2


def _random_model() -> torch.nn.Module:
    model = model_with(read_flat(build(setting.CONFIG, seed=3)))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0)
    return model


def test_a_text_is_read_from_its_gradient():
    text = torch.tensor([list(b"no secret here, or is there one"[:31])])
    model = _random_model()
    manifest = setting.manifest_of(None, rate=1.0, batch=1, steps=1, rule="gradient")
    OffMechanism(manifest, model, text, record_losses).step_gradient()
    told = text[0, :-1]
    there = set(told.tolist())
    order = _tokens(model)
    assert set(order[: len(there)]) == there
    assert bytes(_read(model, order[: len(there)], len(told)).tolist()) == bytes(told.tolist())


def test_inputs_that_repeat_are_noticed():
    inputs, again = _perceptron_inputs(_random_model(), torch.tensor([list(b"aa"), list(b"ab")]))
    assert inputs.shape == (2, setting.CONFIG["hidden_size"])
    assert again.tolist() == [True, False]
    assert len(_spanned(torch.outer(torch.ones(4), torch.arange(3.0)), 3)) == 1


@pytest.mark.parametrize("epsilon", [None, 8.0])
def test_a_swarm_trains_meets_and_agrees(tmp_path: Path, epsilon: float | None):
    generator = torch.Generator().manual_seed(0)
    shards = [torch.randint(97, 107, (40, 64), generator=generator) for _ in range(2)]
    start = read_flat(build(setting.CONFIG, seed=0))
    manifest = setting.manifest_of(epsilon, rate=1e-3, batch=8, steps=5)
    shown: list[ReceivedFragment] = []
    with Swarm(manifest, lambda: model_with(start), shards, tmp_path, watch=shown.append) as swarm:
        swarm.train()
        assert sorted((s.sender, s.fragment) for s in shown) == [
            (peer, fragment) for peer in range(2) for fragment in range(5)
        ]
        before = (swarm.trainers[0].parameters.read() - swarm.trainers[1].parameters.read()).norm()
        released = swarm.close_down()
        after = (released - swarm.trainers[1].parameters.read()).norm()
        assert after < 0.5 * before  # what int8 leaves
        assert not torch.equal(released, start)
        spent = swarm.epsilon_spent()
        if epsilon is None:
            assert spent is None
        else:
            assert spent is not None
            assert 0.9 * epsilon < spent <= epsilon
            assert [ledger.steps_charged for ledger in swarm.ledgers] == [5, 5]


def test_a_canary_is_plain_without_privacy_and_bounded_with_it():
    off = Whitebox(epsilon=None, runs=20).figures()
    assert off["area"] == 1.0
    private = Whitebox(epsilon=2.0, batch=RECORDS // 4, runs=20).figures()
    assert private["bound"] <= private["bound_within_family"] <= private["claimed"] <= 2.0


def test_rates_are_tuned_until_the_best_has_worse_neighbours(tmp_path: Path):
    plan = Plan(seeds=2)
    known: dict[Job, dict[str, object]] = {}
    for _ in range(10):
        for job in plan.tuning("swarm", 0, 8.0, known):
            known[job] = {"tuning": [abs(math.log(job.rate / RATES[1]))]}
    final = plan.final("swarm", 0, 8.0, known)
    assert final is not None
    assert {job.rate for job in final} == {RATES[1]}
    assert [job.seed for job in final] == [0, 1]
    assert {job.rate for job in known if isinstance(job, Utility)} == {*RATES[:4]}


def test_finished_jobs_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Kept, "_of", lambda _self: "this text")
    path = tmp_path / "runs.jsonl"
    job = Utility(method="alone", epsilon=None, rate=1e-3, seed=1, peer=2)
    Kept(path).finished(job, {"tuning": [1.0]})
    with path.open("a") as file:
        file.write('{"of": "cut o')
    assert Kept(path) == {job: {"tuning": [1.0]}}
