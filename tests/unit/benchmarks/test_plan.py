"""Tuning: the grid grows until its best rate has neighbours; then finalists run with all seeds."""

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.convergence import summary
from benchmarks.convergence.methods import METHODS, RATES, VARIANTS, Setting
from benchmarks.convergence.plan import Block, Plan
from benchmarks.simulator.spec import Run


def carry_out(plan, loss):
    """Run everything that is wanted; losses are a function of the run."""
    results: dict[Run, dict[str, Any]] = {}
    while wanted := plan.wanted(results):
        assert len(set(wanted)) >= 1
        run = wanted[0]
        curve = [{"loss": 3.0, "steps": 1.0, "time_s": 1.0, "bytes": 1.0}] * 8
        exports = {f"{part}/8": {"own": [3.1, 3.0]} for part in (2, 4, 6)}
        results[run] = {
            "mean": loss(run),
            "tuning": loss(run),
            "peers": [loss(run) + 0.1],
            "closed": [loss(run), loss(run) + 0.001],
            "distance": 0.0,
            "sent_share": 0.05,
            "steps": [1],
            "curve": curve,
            "exports": exports,
        }
    return results


@given(best=st.sampled_from(RATES))
def test_the_best_rate_of_the_grid_is_found(best):
    plan = Plan((Block(Setting(), ("gossip",)),), seeds=2)
    results = carry_out(plan, lambda run: abs(math.log(run.rate / best)) + 0.001 * run.seed)
    assert plan.rate(Setting(), "gossip", results) == best
    assert len(plan.tuned(Setting(), "gossip", results) or []) == 2


def test_variants_run_at_the_rate_of_the_spread_exchange():
    methods = ("spread", "alone", "synchronous", "all-reduce")
    plan = Plan((Block(Setting(), methods, tuple(VARIANTS)),), seeds=2)
    offsets = {"alone": 3.3, "synchronous": 2.7, "all-reduce": 2.9, "spread": 2.74}

    def loss(run):
        base = offsets.get(run.method, 2.75)
        return base + 0.1 * abs(math.log(run.rate / 5e-3)) + 0.01 * run.seed

    results = carry_out(plan, loss)
    found = summary.summary(plan, results)
    assert {run.rate for run in results if run.method in VARIANTS} == {5e-3}
    assert found["int8_penalty"] == -0.01
    assert found["spread_minus_all_reduce"] == -0.16
    assert found["recovered"] == round((3.4 - 2.74) / (3.4 - 2.7), 4)
    assert found["export_minus_all_reduce"] == {"own": 0.1}
    assert found["closed_range"] == 0.001
    assert "spread" in summary.show(summary.table(plan, results))


def test_bytes_of_groups_and_pairs_are_alike():
    for peers, fragments in ((4, 8), (8, 9)):
        run = Setting(peers=peers).run("spread all-reduce", 5e-3, 0)
        assert run.fragments == fragments
    assert Setting(clock=True).run("spread", 5e-3, 0).slowness == (1, 1, 2, 4)
    assert Setting(8, clock=True).run("spread", 5e-3, 0).slowness == (1, 1, 1, 1, 2, 2, 4, 4)
    assert {"spread", "all-reduce", "alone", "synchronous"} < set(METHODS)
