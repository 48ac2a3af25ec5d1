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
    assert len(calls.inits()) == 4  # the swarm, and three peers alone
    kept = json.loads((short_path / "quick" / "model-lora_eps8-1.json").read_text())
    assert found["lora_eps8_over_start"] == pytest.approx(kept["loss_start"] - kept["loss_swarm"])
    assert kept["loss_alone_averaged"] is not None
    assert kept["loss_exported"] == pytest.approx(kept["loss_swarm"], abs=1e-3)
    assert not (short_path / "quick" / "demo" / "run").exists()


def row(start: float, alone: float, averaged: float, swarm: float) -> summary.Row:
    return {
        "loss_start": start, "loss_alone": alone, "loss_alone_averaged": averaged,
        "loss_swarm": swarm, "warned_of_noise": False,
    }  # fmt: skip


def test_the_summary_has_the_worst_seed() -> None:
    rows = {"lora_off": [row(3.0, 2.8, 2.7, 2.5), row(3.0, 2.6, 2.55, 2.5)]}
    found = summary.summary_of(rows)
    assert found["lora_off_over_start"] == pytest.approx(0.5)
    assert found["lora_off_over_best_alone"] == pytest.approx(0.1)
    assert found["lora_off_over_averaged"] == pytest.approx(0.05)
    assert "2.5500" in summary.table(rows)


def test_noise_is_said_to_drown_all_weights_of_smollm2_and_not_its_adapters() -> None:
    for case in cases.CASES:
        trained = 34_560 if case.adapters else 134_515_008
        plan = case.plan(quick=False)
        report = fake_report()
        warned = summary.row_of(case, plan, report, trained)["warned_of_noise"]
        assert warned is (case.name == "full_eps8")


def fake_report() -> Report:
    return Report(seed=1, peers=[PeerReport("python", loss_swarm=2.0, loss_alone=2.5)])


def test_only_all_weights_are_exchanged_in_parts() -> None:
    plans = {case.name: case.plan(quick=False) for case in cases.CASES}
    assert plans["full_off"].round_fields["round.fragments"] == 5
    assert plans["lora_off"].round_fields["round.fragments"] == 1
    assert len({case.name for case in cases.CASES}) == len(cases.CASES)
