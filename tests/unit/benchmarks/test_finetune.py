"""The benchmarks of own steps and of adapters: tiny runs, and what is made of figures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.finetune import plan as own_plan
from benchmarks.finetune.jobs import Finetuned, Lone
from benchmarks.lora import plan as lora_plan
from benchmarks.lora.jobs import Factors
from benchmarks.privacy import setting, tuning
from benchmarks.simulator.corpora import HELD_OUT_WINDOWS


@pytest.fixture
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two peers with 200 records each, and 128 held-out ones of each kind."""
    generator = torch.Generator().manual_seed(0)

    def records(count: int) -> torch.Tensor:
        return torch.randint(97, 123, (count, setting.RECORD_TOKENS), generator=generator)

    shards = records(200), records(200)
    held_out = records(2 * HELD_OUT_WINDOWS), records(2 * HELD_OUT_WINDOWS)
    monkeypatch.setattr(setting, "shards", lambda: shards)
    monkeypatch.setattr(setting, "held_out", lambda: held_out)


@pytest.mark.usefixtures("little_text")
def test_own_steps_spend_what_the_swarm_kept_back_and_no_more() -> None:
    job = Finetuned(
        rate=4e-3, seed=0, own_rates=(1e-3, 4e-3), steps=2, own_steps=2, batch=4, start_steps=1
    )
    found = job.figures()
    assert 5 < found["epsilon_of_swarm"] <= 6, "three quarters of 8"
    assert len(found["peers"]) == 2
    for peer in found["peers"]:
        own = peer["own"]
        assert [run["rate"] for run in own] == [1e-3, 4e-3]
        assert all(run["steps"] == 2 for run in own)
        assert all(7 < run["epsilon_spent"] <= 8 for run in own), "each as if it were the only one"
        assert len({run["own"] for run in own} | {peer["swarm"]["own"]}) == 3
    alone = Lone(rate=4e-3, seed=0, peer=1, steps=4, batch=4, start_steps=1).figures()
    assert 7 < alone["epsilon_spent"] <= 8
    assert 0 < alone["own"] < 10


@pytest.mark.usefixtures("little_text")
def test_adapters_are_trained_and_b_alone_loses_nothing() -> None:
    found = {
        train: Factors(
            train=train, epsilon=None, rate=4e-3, seed=0, steps=4, batch=4, start_steps=1
        ).figures()
        for train in ("both", "B")
    }
    assert found["both"]["trained_params"] > 1.5 * found["B"]["trained_params"]
    assert found["both"]["misalignment"] > 0 == found["B"]["misalignment"]
    for figures in found.values():
        assert {peer["report"] for peer in figures["peers"]} != {figures["start"]}


def test_a_method_is_tuned_until_its_best_rate_is_no_edge() -> None:
    def make(rate: float) -> Lone:
        return Lone(rate=rate, seed=0, peer=0)

    best_at, known = 1e-3, dict[Any, dict[str, Any]]()
    while True:
        runs, best = tuning.grid(make, lambda f: float(f["loss"]), known, (4e-3, 8e-3))
        if best is not None:
            break
        for run in runs:
            known[run] = {"loss": abs(run.rate - best_at)}
    assert best == make(best_at)
    assert sorted(run.rate for run in runs) == [5e-4, 1e-3, 2e-3, 4e-3, 8e-3]


def test_claims_of_own_steps() -> None:
    rows = [
        {
            "seed": seed,
            "swarm": {"own": 3.0, "mixed": 3.0},
            "finetuned": {"own": 2.0 + gap, "mixed": 3.1},
            "alone": {"own": 2.5, "mixed": 3.5},
            "epsilon_finetuned": 7.9,
            "epsilon_alone": 7.8,
        }
        for seed, gap in ((0, 0.0), (0, 0.2), (1, 0.6))
    ]
    found = own_plan.summary_of(rows)
    assert found["gain_own_by_seed"] == [0.4, -0.1]
    assert found["worst_gap_own"] == 0.1
    assert found["gain_mixed"] == 0.4
    assert (found["epsilon_finetuned"], found["epsilon_alone"]) == (7.9, 7.8)


@pytest.mark.parametrize(("losses", "resolved"), [([1.9, 2.9], True), ([1.9, 3.1], False)])
def test_claims_of_adapters(losses: list[float], resolved: bool) -> None:
    same = {"epsilon": 8.0, "rate": 1e-2, "misalignment": [0.001, 0.002], "trained_params": 10}
    rows = [
        {"train": "both", "loss": [2.0, 3.0], **same},
        {"train": "B", "loss": losses, **same},
    ]
    found = lora_plan.summary_of(rows)
    assert found["resolved_eps8"] == resolved
    assert found["b_minus_both_eps8"] == pytest.approx([losses[0] - 2.0, losses[1] - 3.0])
