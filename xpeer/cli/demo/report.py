"""The demo's report: losses on everybody's held-out text as a table, as text and as a plot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from xpeer.cli.common import say
from xpeer.cli.demo.heldout import Curve, mean
from xpeer.leaves import Local, Parts, Public, seen_by
from xpeer.policies import PrivacyMode, privacy_policy


@seen_by("node", "of text on this machine")
@dataclass
class PeerReport:
    """The results of one peer, as `--json` prints them. Losses are nats per `Report.unit`."""

    corpus: Public[str]
    peer_id: Public[str] = ""
    speed: Public[float] = 1.0
    loss_alone: Local[float | None] = None
    """Loss on everybody's text of its best run without partners; None = there was no such run."""
    alone_by_kind: Local[dict[str, float]] = field(default_factory=dict)
    alone_learning_rate: Local[float | None] = None
    loss_swarm: Local[float] = float("nan")
    swarm_by_kind: Local[dict[str, float]] = field(default_factory=dict)
    swarm_curve: Local[Curve] = field(default_factory=list)
    alone_curve: Local[Curve] = field(default_factory=list)
    epsilon: Local[float] = 0.0
    delta: Local[float] = 0.0
    steps: Local[int] = 0
    exchanges: Local[int] = 0
    one_sided: Local[int] = 0
    bytes_sent: Local[int] = 0


@seen_by("node", "of a model that was trained on text on this machine")
@dataclass
class Sample:
    """A text that the model wrote before and after."""

    corpus: Public[str]
    prompt: Public[str]
    before: Local[str]
    """The likeliest continuation before any training."""
    after: Local[str] = ""


@seen_by("node", "of text on this machine")
@dataclass
class Report:
    """All results of the demo. Losses are nats per `unit`."""

    seed: Public[int]
    quick: Public[bool] = False
    model: Public[str] = ""
    """Folder of the given model; empty = the demo's own."""
    privacy: Public[PrivacyMode] = "record"
    """Mode of the manifest."""
    unit: Public[str] = "byte"
    """`byte` or `token`: what losses are counted by."""
    start_by_kind: Local[dict[str, float]] = field(default_factory=dict)
    loss_start: Local[float] = float("nan")
    loss_alone_averaged: Local[float | None] = None
    """Loss of the plain average of the lone models; None unless all peers trained alone."""
    loss_exported: Local[float | None] = None
    """Loss of the export as transformers (and peft) load it, without xpeer."""
    samples: Parts[list[Sample]] = field(default_factory=list)
    peers: Parts[list[PeerReport]] = field(default_factory=list)
    windows: Local[int] = 0
    bytes_sent: Local[int] = 0
    compression_ratio: Local[float | None] = None
    epsilon: Local[float] = 0.0
    delta: Local[float] = 0.0
    consensus_distance: Local[float | None] = None
    report: Local[str] = ""
    checkpoint: Local[str] = ""
    seconds: Local[float] = 0.0


def table_of(report: Report, labels: Mapping[str, str]) -> Table:
    """A table of losses by model and kind of text, of lone models and the swarm's."""
    table = Table(
        title=f"Loss on held-out text (nats per {report.unit}; lower is better)", box=None
    )
    table.add_column("model", no_wrap=True)
    for kind in report.start_by_kind:
        table.add_column(kind, justify="right")
    table.add_column("all text", justify="right", style="bold")
    _add(table, "public start", report.start_by_kind)
    for peer in report.peers:
        if peer.alone_by_kind:
            _add(table, f"alone: {peer.corpus}", peer.alone_by_kind)
    if report.loss_alone_averaged is not None:
        blanks = [""] * len(report.start_by_kind)
        table.add_row("alone, averaged", *blanks, f"{report.loss_alone_averaged:.3f}")
    for peer in report.peers:
        _add(table, f"swarm: {peer.corpus}", peer.swarm_by_kind)
    table.caption = "\n".join(f"{kind}: {labels[kind]}" for kind in report.start_by_kind)
    return table


def _add(table: Table, name: str, by_kind: Mapping[str, float]) -> None:
    table.add_row(name, *(f"{loss:.3f}" for loss in by_kind.values()), f"{mean(by_kind):.3f}")


def words_of(report: Report) -> list[str]:
    """The table's results in sentences, including those in which a lone model is better."""
    worst = max(peer.loss_swarm for peer in report.peers)
    lines = [
        f"swarm: {report.loss_start - worst:.3f} nats better than the public start on all text"
    ]
    alone = [peer.loss_alone for peer in report.peers if peer.loss_alone is not None]
    if alone:
        which = "the best lone model" if len(alone) > 1 else "the lone model"
        lines[0] += f", {min(alone) - worst:.3f} better than {which}"
        if report.loss_alone_averaged is not None:
            lines[0] += f", {report.loss_alone_averaged - worst:.3f} better than their average"
    for peer in report.peers:
        if peer.alone_by_kind:
            lines.append(_about_own_text(peer))
    lines += _about_missing(report)
    if report.loss_exported is not None:
        loader = "transformers and peft" if report.model else "transformers"
        lines.append(
            f"the export, loaded by {loader} alone: {report.loss_exported:.4f} nats per "
            f"{report.unit} on all text; in its node {report.peers[0].loss_swarm:.4f}"
        )
    return lines


def _about_missing(report: Report) -> list[str]:
    """What was left out to save time."""
    lone = [peer.corpus for peer in report.peers if peer.alone_by_kind]
    if not lone or len(lone) == len(report.peers):
        return []
    return [f"to save time only {' and '.join(lone)} trained alone, at the best of a few rates"]


def samples_of(report: Report) -> list[str]:
    """What the model wrote before and after, in lines."""
    lines = []
    for sample in report.samples:
        lines.append(f"{sample.corpus}, after {json.dumps(sample.prompt, ensure_ascii=False)}")
        lines.append(f"  before: {json.dumps(sample.before, ensure_ascii=False)}")
        lines.append(f"  swarm:  {json.dumps(sample.after, ensure_ascii=False)}")
    return lines


def _about_privacy(report: Report, record_tokens: int) -> list[str]:
    if not privacy_policy(report.privacy).charges:
        return ["privacy: off; what these peers sent protects nothing of their text"]
    lines = [
        f"privacy: every peer's records at epsilon <= {report.epsilon:.2f}, delta <= "
        f"{report.delta:.1e}; a record is {record_tokens} {report.unit}s, not a whole file"
    ]
    if any(peer.alone_by_kind for peer in report.peers):
        lines.append(
            "         (of the swarm's run; the lone runs are a comparison, and on real text "
            "their epsilon would have to be paid on top)"
        )
    return lines


def say_summary(report: Report, record_tokens: int) -> None:
    """Print the results in sentences, on stderr."""
    ratio = report.compression_ratio or 0.0
    for line in (*words_of(report), *samples_of(report)):
        say(line)
    for line in _about_privacy(report, record_tokens):
        say(line)
    say(
        f"{report.windows} windows, {sum(p.exchanges for p in report.peers)} exchanges, "
        f"{report.bytes_sent / 1e6:.1f} MB sent in all, {ratio:.2f}x compressed, "
        f"consensus distance {report.consensus_distance or 0.0:.4f}"
    )
    loader = "AutoModelForCausalLM" if not report.model else "peft.PeftModel"
    say(f"plot {report.report}; model {report.checkpoint} ({loader} loads it)")


def _about_own_text(peer: PeerReport) -> str:
    own = peer.corpus
    ahead = peer.swarm_by_kind[own] - peer.alone_by_kind[own]
    others = [kind for kind in peer.swarm_by_kind if kind != own]
    behind = [peer.alone_by_kind[kind] - peer.swarm_by_kind[kind] for kind in others]
    at_home = (
        f"the lone {own} model is {ahead:.3f} better than the swarm on its own text"
        if ahead > 0
        else f"the swarm is {-ahead:.3f} better than the lone {own} model even on its own text"
    )
    elsewhere = " and ".join(
        f"{abs(gap):.3f} {'worse' if gap > 0 else 'better'} on {kind}"
        for kind, gap in zip(others, behind, strict=True)
    )
    return f"{at_home}; the lone model is {elsewhere}"


def plot(report: Report, path: Path) -> None:
    """Save a PNG with the held-out loss by step and the gains by kind of text."""
    import matplotlib as mpl  # noqa: PLC0415 - takes a second, wanted here only

    mpl.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12.5, 5))
    _draw_curves(left, report)
    _draw_gains(right, report)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw_curves(axes: Any, report: Report) -> None:
    axes.axhline(report.loss_start, color="grey", linestyle="--", label="public start")
    for number, peer in enumerate(report.peers):
        colour = f"C{number}"
        if peer.alone_curve:
            label = f"{peer.corpus} alone"
            axes.plot(*zip(*peer.alone_curve, strict=True), color=colour, linewidth=1, label=label)
        label = f"{peer.corpus} in the swarm"
        axes.plot(
            *zip(*peer.swarm_curve, strict=True), color=colour, linewidth=3.5, marker="o",
            markersize=5, label=label,
        )  # fmt: skip
    if report.loss_alone_averaged is not None:
        axes.axhline(
            report.loss_alone_averaged, color="black", linestyle=":", linewidth=1,
            label="the lone models, averaged at the end",
        )  # fmt: skip
    axes.set(
        xlabel="own private steps", ylabel=f"nats per {report.unit} (lower is better)",
        title="Everybody's held-out text",
    )  # fmt: skip
    axes.legend(fontsize=8)


def _draw_gains(axes: Any, report: Report) -> None:
    """Bars from zero: how much each model gained over the public start on each kind of text."""
    kinds = list(report.start_by_kind)
    models: list[tuple[str, str, dict[str, float]]] = [
        (f"{peer.corpus} alone", f"C{number}", peer.alone_by_kind)
        for number, peer in enumerate(report.peers)
        if peer.alone_by_kind
    ]
    worst = max(report.peers, key=lambda peer: peer.loss_swarm)
    models.append(("swarm (its worst peer)", "0.25", worst.swarm_by_kind))
    width = 0.8 / len(models)
    for place, (label, colour, losses) in enumerate(models):
        gains = [report.start_by_kind[kind] - losses[kind] for kind in kinds]
        gains.append(sum(gains) / len(gains))
        at = [x + (place - (len(models) - 1) / 2) * width for x in range(len(gains))]
        axes.bar(at, gains, width, color=colour, label=label)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(kinds) + 1), [*(f"{kind} text" for kind in kinds), "all text"])
    axes.set(
        ylabel=f"nats per {report.unit} gained (higher is better)",
        title="Gain over the public start",
    )
    axes.legend(fontsize=8)
