"""How much of a run is done, and the learning rate that follows."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.training.loops import manifest_with
from xpeer.manifest import End, Optimiser
from xpeer.manifest.privacy import Privacy
from xpeer.training.schedule import Counters, learning_rate, planned_steps, share_done


@pytest.mark.parametrize(
    ("end", "counters", "share"),
    [
        (End(), Counters(step=9), None),
        (End(steps=10), Counters(step=5), 0.5),
        (End(rounds=4), Counters(window=4), 1.0),
        (End(seconds=10.0), Counters(seconds=2.5), 0.25),
        (End(tokens=64 * 128 * 10), Counters(step=5, tokens=1), 0.5),
        (End(steps=10, seconds=10.0), Counters(step=1, seconds=9.0), 0.9),
    ],
)
def test_the_first_end_condition_counts(end: End, counters: Counters, share: float | None) -> None:
    assert share_done(counters, manifest_with(end=end, optimiser=Optimiser())) == share


def test_without_privacy_tokens_count_as_they_are() -> None:
    manifest = manifest_with(end=End(tokens=1000), privacy=Privacy(mode="off"))
    assert share_done(Counters(tokens=500), manifest) == 0.5


def test_planned_steps() -> None:
    assert planned_steps(manifest_with()) is None
    assert planned_steps(manifest_with(end=End(steps=7, rounds=5))) == 7
    assert planned_steps(manifest_with(end=End(rounds=5))) == 20
    assert planned_steps(manifest_with(end=End(seconds=5.0))) is None


@pytest.mark.parametrize(
    ("schedule", "half", "end"),
    [("constant", 1.0, 1.0), ("linear", 0.6, 0.2), ("cosine", 0.6, 0.2)],
)
def test_learning_rate_decays_to_its_final_share(schedule: Any, half: float, end: float) -> None:
    manifest = manifest_with(
        end=End(steps=100),
        optimiser=Optimiser(learning_rate=1.0, warmup_steps=10, schedule=schedule, final_rate=0.2),
    )
    rates = [learning_rate(Counters(step=s), manifest) for s in (0, 4, 50, 100)]
    assert rates[0] == pytest.approx(0.1, rel=0.01)
    assert rates[1] == pytest.approx(0.5, rel=0.05)
    assert rates[2:] == [pytest.approx(half), pytest.approx(end)]
