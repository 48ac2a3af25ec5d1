"""The picture of the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt


def draw(details: dict[str, Any], path: Path) -> None:
    """Bars: seconds to average, MB/s of the links, shares of shaped links."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 5.5), layout="constrained")
    averaging = {
        f"{count} peers, {name}": run["median_s"]
        for count, runs in details["averaging"].items()
        for name, run in runs.items()
    }
    _bars(
        axes[0],
        averaging,
        f"{details['plan']['params'] / 1e6:g} M parameters averaged, loopback",
        "s",
    )
    _bars(axes[1], details["links_mb_s"], "One way, loopback", "MB/s")
    shares = {
        f"{mbit} Mbit/s, {name}": share
        for mbit, link in details["shaped"].items()
        for name, share in link["shares"].items()
    }
    _bars(axes[2], shares, "Share of a shaped link's rate", "")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(axes: Any, values: dict[str, float], title: str, unit: str) -> None:
    names = list(values)
    colours = ["tab:blue" if "xpeer" in n else "tab:gray" for n in names]
    bars = axes.barh(names, list(values.values()), color=colours)
    axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(unit)
    axes.tick_params(axis="y", labelsize=8)
    axes.margins(x=0.15)
