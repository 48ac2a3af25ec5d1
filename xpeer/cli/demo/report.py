"""What came of it: losses on everybody's held-out text, a plot, a few words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.table import Table

from xpeer.training.checkpoint import load_latest
from xpeer.training.flat import write_flat
from xpeer.training.losses import evaluate
from xpeer.training.model import from_folder
from xpeer.training.tokenizer import ByteTokenizer

Curve = list[tuple[int, float]]
"""(step, validation loss on the peer's own held-out text)."""


class HeldOut:
    """Everybody's held-out text, in equal parts; no daemon has seen any of it.

    Args:
        parts: (n, T) int64 records per kind of text.
        start: Hugging Face folder of the public start.
    """

    def __init__(self, parts: Mapping[str, torch.Tensor], start: Path) -> None:
        fewest = min(len(part) for part in parts.values())
        self._records = torch.cat([part[:fewest] for part in parts.values()])
        self._model = from_folder(start)

    @property
    def num_records(self) -> int:
        """In all."""
        return len(self._records)

    def loss_of_start(self) -> float:
        """Nats per byte of the public start; call first."""
        return evaluate(self._model, self._records, ByteTokenizer().pad_id, 64)

    def loss(self, params: torch.Tensor) -> float:
        """Nats per byte of (P,) parameters."""
        write_flat(self._model, params)
        return evaluate(self._model, self._records, ByteTokenizer().pad_id, 64)


def params_of(checkpoints: Path) -> torch.Tensor:
    """(P,) parameters of a home's newest checkpoint."""
    bundle, _ = load_latest(checkpoints)
    if bundle is None:
        raise FileNotFoundError(checkpoints)
    return bundle.flat


@dataclass
class PeerReport:
    """One row of the report; `--json` prints it as it stands."""

    corpus: str
    peer_id: str = ""
    speed: float = 1.0
    loss_alone: float = float("nan")
    alone_learning_rate: float = 0.0
    loss_swarm: float = float("nan")
    epsilon: float = 0.0
    delta: float = 0.0
    steps: int = 0
    exchanges: int = 0
    one_sided: int = 0
    bytes_sent: int = 0


@dataclass
class Report:
    """Everything that the demo found out."""

    seed: int
    loss_start: float = float("nan")
    loss_alone_averaged: float = float("nan")
    peers: list[PeerReport] = field(default_factory=list)
    rounds: int = 0
    bytes_sent: int = 0
    compression_ratio: float | None = None
    epsilon: float = 0.0
    delta: float = 0.0
    consensus_distance: float | None = None
    sample: str = ""
    report: str = ""
    checkpoint: str = ""
    seconds: float = 0.0


def table_of(report: Report, labels: Mapping[str, str]) -> Table:
    """The losses as a table."""
    table = Table(title="Loss on everybody's held-out text (nats per byte; lower is better)")
    for name in ("peer", "private text", "public start", "alone", "swarm", "gain over alone"):
        table.add_column(name, justify="left" if name in ("peer", "private text") else "right")
    for peer in report.peers:
        table.add_row(
            peer.peer_id[-8:],
            labels[peer.corpus],
            f"{report.loss_start:.4f}",
            f"{peer.loss_alone:.4f}",
            f"{peer.loss_swarm:.4f}",
            f"{peer.loss_alone - peer.loss_swarm:+.4f}",
        )
    averaged = f"{report.loss_alone_averaged:.4f}"
    table.add_row("", "plain average of the alone models", "", averaged, "", "")
    return table


def plot(
    report: Report,
    swarm: Mapping[str, Curve],
    alone: Mapping[str, Curve],
    labels: Mapping[str, str],
    path: Path,
) -> None:
    """Save the curves and the final losses as a PNG."""
    import matplotlib as mpl  # noqa: PLC0415 - takes a second, wanted here only

    mpl.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    for number, corpus in enumerate(swarm):
        colour = f"C{number}"
        left.plot(*_columns(swarm[corpus]), color=colour, label=f"{labels[corpus]}: swarm")
        left.plot(*_columns(alone.get(corpus, [])), color=colour, linestyle="--", label="alone")
    left.set(xlabel="private step", ylabel="nats per byte", title="Each peer's own held-out text")
    left.legend(fontsize=7)
    names = [peer.corpus for peer in report.peers]
    places = range(len(names))
    right.bar([x - 0.2 for x in places], [p.loss_alone for p in report.peers], 0.4, label="alone")
    right.bar([x + 0.2 for x in places], [p.loss_swarm for p in report.peers], 0.4, label="swarm")
    right.axhline(report.loss_start, color="grey", linestyle=":", label="public start")
    right.axhline(report.loss_alone_averaged, color="black", linewidth=0.8, label="alone, averaged")
    losses = [report.loss_start, *(p.loss_swarm for p in report.peers)]
    right.set_ylim(min(losses) - 0.1, max(losses) + 0.1)
    right.set_xticks(list(places), names)
    right.set(ylabel="nats per byte", title="Everybody's held-out text, at the end")
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _columns(curve: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in curve], [loss for _, loss in curve]
