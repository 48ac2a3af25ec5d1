"""`python -m benchmarks.llm --quick`: its whole way, with nodes that take no step."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.llm import __main__ as llm
from benchmarks.llm import cases, summary
from tests import fake_swarm
from xpeer.cli.demo.report import PeerReport, Report


@pytest.fixture
def short_path() -> Iterator[Path]:
    """Sockets of homes have to fit into 100 bytes."""
    with tempfile.TemporaryDirectory(prefix="xl-") as folder:
        yield Path(folder)


def test_a_quick_run_compares_the_swarm_with_lone_peers_and_their_average(
    short_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = fake_swarm.install(monkeypatch)
    monkeypatch.setattr(cases, "QUICK_CASES", cases.QUICK_CASES[:1])
    arguments = ["--quick", "--out", str(short_path)]
    llm.main(arguments)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["benchmark"] == "llm"
    assert len(calls.inits()) == 2 * 4  # at two rates the swarm, and three peers alone
    kept, other = (
        json.loads((short_path / "quick" / f"model-lora_eps8-{rate}-1.json").read_text())
        for rate in ("0.01", "0.02")
    )
    best = min(kept["loss_swarm"], other["loss_swarm"])
    assert found["lora_eps8_over_start"] == [pytest.approx(kept["loss_start"] - best, abs=1e-4)]
    assert kept["loss_alone_averaged"] is not None
    assert kept["loss_exported"] == pytest.approx(kept["loss_swarm"], abs=1e-3)
    assert not (short_path / "quick" / "demo" / "run").exists()


def run(rate: float, swarm: float, alone: dict[str, tuple[float, float]]) -> summary.Row:
    """A run; `alone`: loss and rate of each lone peer."""
    return {
        "rate": rate, "loss_start": 3.0, "loss_swarm": swarm, "warned_of_noise": False,
        "swarm": {peer: {} for peer in alone},
        "alone": {peer: {"text": n} for peer, n in alone.items()},
        "losses_alone": {peer: loss for peer, (loss, _) in alone.items()},
        "rates": {peer: rate for peer, (_, rate) in alone.items()},
        "loss_alone_averaged": 2.7,
    }  # fmt: skip


def test_the_best_swarm_is_compared_with_the_best_lone_peers_of_all_runs() -> None:
    case = cases.Case(True, "off", ((1e-2, (1e-2, 2e-2)), (2e-2, (4e-2,))))
    runs = [
        run(1e-2, 2.5, {"a": (2.6, 1e-2), "b": (2.9, 2e-2)}),
        run(2e-2, 2.4, {"a": (2.8, 4e-2), "b": (2.7, 4e-2)}),
    ]
    best = summary.best_of(case, runs)
    assert (best["loss_swarm"], best["rate"], best["loss_alone"]) == (2.4, 2e-2, 2.6)
    assert best["rates"] == {"a": 1e-2, "b": 4e-2}
    assert best["alone"] == {"a": {"text": (2.6, 1e-2)}, "b": {"text": (2.7, 4e-2)}}
    assert (best["at_an_edge"], best["rate_at_an_edge"]) == (["a", "b"], True)
    found = summary.summary_of({"lora_off": [best, best]})
    assert found["lora_off_over_start"] == pytest.approx([0.6, 0.6])
    assert found["lora_off_over_best_alone"] == pytest.approx([0.2, 0.2])
    assert found["lora_off_over_averaged"] == pytest.approx([0.3, 0.3])
    assert "lone rates at an edge: a, b" in summary.table({"lora_off": [best]})


def test_noise_is_said_to_drown_all_weights_of_smollm2_and_not_its_adapters() -> None:
    for case in cases.CASES:
        trained = 34_560 if case.adapters else 134_515_008
        plan = case.plan(0, quick=False)
        report = fake_report()
        warned = summary.row_of(case, plan, report, trained)["warned_of_noise"]
        assert warned is (case.name == "full_eps8")


def fake_report() -> Report:
    return Report(seed=1, peers=[PeerReport("python", loss_swarm=2.0, loss_alone=2.5)])


def test_only_all_weights_are_exchanged_in_parts() -> None:
    plans = {case.name: case.plan(0, quick=False) for case in cases.CASES}
    assert plans["full_off"].round_fields["round.fragments"] == 5
    assert plans["lora_off"].round_fields["round.fragments"] == 1
    assert len({case.name for case in cases.CASES}) == len(cases.CASES)
