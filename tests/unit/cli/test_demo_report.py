"""The demo's report: every curve has a point a window, and a lone model's advantage is said."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from xpeer.cli.demo.heldout import HeldOut, Snapshots, mean
from xpeer.cli.demo.report import PeerReport, Report, plot, table_of, words_of
from xpeer.cli.demo.warmup import records_of
from xpeer.training import checkpoint
from xpeer.training.flat import read_flat
from xpeer.training.model import build

KINDS = ("python", "headers", "licences")
LABELS = {kind: f"all about {kind}" for kind in KINDS}
TINY = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 259,
    "max_position_embeddings": 32, "bos_token_id": 256, "eos_token_id": 257,
}  # fmt: skip


def report(own: float = 2.5, quick: bool = False) -> Report:
    """The lone models are at `own` on their own text and at 3.0 elsewhere; the swarm at 2.7."""
    made = Report(seed=1, quick=quick, start_by_kind=dict.fromkeys(KINDS, 3.2), loss_start=3.2)
    for kind in KINDS:
        peer = PeerReport(kind, loss_swarm=2.7, swarm_by_kind=dict.fromkeys(KINDS, 2.7))
        peer.swarm_curve = [(0, 3.2), (5, 2.9), (10, 2.7)]
        if not quick:
            peer.alone_by_kind = {k: own if k == kind else 3.0 for k in KINDS}
            peer.loss_alone = mean(peer.alone_by_kind)
            peer.alone_curve = [(0, 3.2), (5, 3.0), (10, peer.loss_alone)]
        made.peers.append(peer)
    made.loss_alone_averaged = None if quick else 2.75
    return made


def test_a_lone_models_advantage_on_its_own_text_is_said_aloud():
    lines = words_of(report())
    assert lines[0] == (
        "swarm: 0.500 nats better than the public start on all text, 0.133 better than the best "
        "lone model, 0.050 better than their average"
    )
    assert lines[1] == (
        "the lone python model is 0.200 better than the swarm on its own text; the lone model is "
        "0.300 worse on headers and 0.300 worse on licences"
    )
    assert (
        "the swarm is 0.100 better than the lone python model even on" in words_of(report(2.8))[1]
    )


@pytest.mark.parametrize("quick", [False, True])
def test_the_table_fits_a_terminal_and_the_plot_is_written(tmp_path: Path, quick: bool):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table_of(report(quick=quick), LABELS))
    text = console.export_text()
    assert "…" not in text
    assert all(f"swarm: {kind}" in text for kind in KINDS)
    assert ("alone: python" in text) is not quick
    plot(report(quick=quick), tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def save(folder: Path, flat: torch.Tensor, step: int) -> None:
    counters = {"step": step}
    bundle = checkpoint.Bundle(flat, flat * 0, flat * 0, step, counters=counters)
    checkpoint.save(folder, bundle, keep=9)


def test_a_curve_has_the_start_a_point_a_window_and_the_end(tmp_path: Path):
    model = build(TINY, seed=0)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    flat = read_flat(model)
    held_out = HeldOut({kind: records_of([f"{kind} " * 40], 16) for kind in KINDS}, model)
    start_loss = mean(held_out.of_start())
    snapshots = Snapshots(folder, every=5)
    snapshots.look()  # none yet
    for step in (2, 5, 7, 10, 12):
        save(folder, flat * (1 - step / 100), step)
        snapshots.look()
    snapshots.look(last=True)
    assert [step for step, _ in snapshots.kept] == [5, 10, 12]
    assert torch.equal(snapshots.last(), flat * 0.88)
    save(folder, flat * 0.5, 12)  # the same step after the closing consolidation
    snapshots.look(last=True)
    assert torch.equal(snapshots.last(), flat * 0.5)
    curve = snapshots.curve(start_loss, held_out, held_out.loss(flat * 0.5))
    assert [step for step, _ in curve] == [0, 5, 10, 12]
    assert curve[0][1] == start_loss
    assert curve[-1][1] == pytest.approx(held_out.loss(flat * 0.5))
