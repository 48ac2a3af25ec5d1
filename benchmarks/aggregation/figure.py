"""Draws the results: loss by rounds, by time and by cost; and how the corpus gets divided."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes

mpl.use("Agg")

from matplotlib import pyplot as plt

from benchmarks.aggregation.division import POLICIES


def draw(methods: dict[str, dict[str, Any]], shares: dict[str, Any], path: Path) -> None:
    """Four panels, averaged over seeds.

    Args:
        methods: `work.results`.
        shares: figures of `division.Run` by policy, with and without a change.
        path: of the PNG.
    """
    figure, axes = plt.subplots(1, 4, figsize=(19, 4.5), layout="constrained")
    for panel, key, unit, label in (
        (axes[0], "round", 1.0, "rounds (steps of all clouds / (4 H))"),
        (axes[1], "time_s", 3600.0, "simulated hours"),
        (axes[2], "cost_usd", 1.0, "US dollars, computing and egress"),
    ):
        _losses(panel, methods, key, unit)
        panel.set_xlabel(label)
    axes[0].set_ylabel("average model, nats per byte, all kinds of text")
    axes[0].legend(fontsize=8)
    _makespans(axes[3], shares)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _losses(panel: Axes, methods: dict[str, dict[str, Any]], key: str, unit: float) -> None:
    for name, found in methods.items():
        points = list(zip(*(run["curve"] for run in found["runs"]), strict=True))
        x = [statistics.fmean(point[key] for point in seeds) / unit for seeds in points]
        y = [statistics.fmean(point["loss"] for point in seeds) for seeds in points]
        width = 3 if name == "spread gossip" else 1.3
        panel.plot(
            x, y, label=f"{name} (rate {found['rate']:g})", linewidth=width, marker="o", ms=3
        )
    panel.grid(alpha=0.3)


def _makespans(panel: Axes, shares: dict[str, Any]) -> None:
    for offset, (key, label) in enumerate((("steady", "steady"), ("changing", "one slows down"))):
        hours = [shares[key][policy]["makespan_s"] / 3600 for policy in POLICIES]
        bars = panel.bar([n + 0.4 * offset for n in range(len(POLICIES))], hours, 0.38, label=label)
        panel.bar_label(bars, fmt="%.1f", fontsize=8)
    panel.set_xticks([n + 0.2 for n in range(len(POLICIES))], POLICIES)
    panel.set_ylabel("hours until all of the corpus was trained on")
    panel.legend(fontsize=8)
