"""Draws the results: loss by tokens, by bytes and by simulated time."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes

mpl.use("Agg")

from matplotlib import pyplot as plt

_MEGABYTE = 1e6


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel per horizontal axis, averaged over seeds.

    Args:
        rows: `summary.table`.
        path: of the PNG.
    """
    tokens = [row for row in rows if row["setting"] == rows[0]["setting"]]
    clock = [row for row in rows if row["setting"].endswith("clock")]
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    _panel(axes[0], tokens, "steps", 1.0, "steps of each peer")
    _panel(axes[1], [r for r in tokens if r["sent_share"]], "bytes", _MEGABYTE, "MB sent per peer")
    axes[1].set_xscale("log")
    _panel(axes[2], clock, "time_s", 60.0, "simulated minutes, speeds 1, 1, 2, 4")
    axes[0].set_ylabel("mean model, nats per byte, everybody's held-out text")
    figure.suptitle(rows[0]["setting"] + ", rates tuned for each method, mean over seeds")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axes: Axes, rows: list[dict[str, Any]], key: str, unit: float, label: str) -> None:
    for row in rows:
        if row["method"].startswith("spread,"):
            continue
        points = list(zip(*row["curve"], strict=True))
        x = [statistics.fmean(point[key] for point in seeds) / unit for seeds in points]
        y = [statistics.fmean(point["loss"] for point in seeds) for seeds in points]
        wide = row["method"] == "spread"
        axes.plot(x, y, label=row["method"], linewidth=3 if wide else 1.3, marker="o", ms=3)
    axes.set_xlabel(label)
    axes.grid(alpha=0.3)
    if rows:
        axes.legend(fontsize=7)
