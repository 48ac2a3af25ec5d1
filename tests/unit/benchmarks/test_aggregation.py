"""The pure parts of the `aggregation` benchmark."""

from __future__ import annotations

import pytest
import torch

from benchmarks.aggregation import division, work
from benchmarks.aggregation.setting import METHODS, RATES, TUNING_ROUNDS, Trial, cost_usd
from benchmarks.aggregation.summary import reach
from benchmarks.simulator import model
from benchmarks.simulator.corpora import Corpus
from xpeer.training import partition


def test_cost_is_rent_and_egress():
    assert cost_usd(3600, 0) == pytest.approx(8.0)
    assert cost_usd(0, 10e9) == pytest.approx(0.9)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_manifest(method):
    trial = Trial(method, 1e-3)
    assert trial.run().manifest().optimiser.warmup_steps == (3 if method == "gradient" else 24)


def test_a_rate_is_tuned_until_its_neighbours_are_worse():
    tried = []

    def figures(trial: Trial) -> dict[str, float]:
        tried.append(trial)
        return {"tuning": abs(trial.rate - RATES[4])}

    assert work.tuned_rate("FedAvg", figures) == RATES[4]
    assert {t.rate for t in tried} == set(RATES[1:])
    assert all(t.rounds == TUNING_ROUNDS for t in tried)


def test_the_first_point_at_a_loss():
    curve = [
        {"round": 5.0, "loss": 3.0},
        {"round": 10.0, "loss": 2.0},
        {"round": 15.0, "loss": 2.5},
    ]
    assert reach(curve, 2.25) == {"round": 8.75, "loss": 2.25}
    assert reach(curve, 3.5) == curve[0]
    assert reach(curve, 1.0) is None


def test_accuracy_counts_next_bytes_that_come_first():
    generator = torch.Generator().manual_seed(0)
    theta = torch.stack([model.initial(generator) for _ in range(2)])
    records = torch.randint(0, 256, (6, model.CONTEXT + 1), generator=generator)
    found = model.accuracy(theta, records, at_once=4)
    again = model.accuracy(theta[1:], records)
    assert found.shape == (2,)
    assert found[1] == pytest.approx(float(again[0]))
    assert bool((found < 0.1).all())


def test_every_record_of_the_divided_text_is_somebodys_and_none_is_there_twice():
    raw = torch.randint(97, 123, (30_000,), generator=torch.Generator().manual_seed(0))
    corpus = Corpus("letters", raw.to(torch.uint8), raw[:0], "")
    manifest = Trial("spread gossip", 1e-3).run().manifest()
    text = division.text_of((corpus,), manifest, 20_000)
    assert len({tuple(record) for record in text.records.tolist()}) == len(text.records)
    rows = [row for piece in text.rows.values() for row in piece]
    assert sorted(rows) == list(range(len(text.records)))
    parts = [partition.divide(text.documents, manifest, {"a": 1.0, "b": 1.0}, me)[0] for me in "ab"]
    assert {piece.id for part in parts for piece in part} == set(text.rows)
