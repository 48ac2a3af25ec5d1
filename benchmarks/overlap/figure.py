"""The picture of the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt

_COLOURS = {"snapshot": "tab:blue", "merge": "tab:orange", "other": "tab:gray"}


def draw(points: dict[str, Any], shown: str, path: Path) -> None:
    """What is not computing: shares on every link, and step by step on one.

    Args:
        points: results by link.
        shown: the one whose steps are drawn.
        path: of the PNG.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    bars = {"alone": next(iter(points.values()))["alone"]}
    bars |= {name: min(p["together"], key=_speed) for name, p in points.items()}
    base = [0.0] * len(bars)
    for kind, colour in _COLOURS.items():
        heights = [100 * each[kind] for each in bars.values()]
        left.bar(list(bars), heights, bottom=base, color=colour, label=kind)
        base = [a + b for a, b in zip(base, heights, strict=True)]
    left.set_ylabel("% of the time of the slower peer")
    left.set_title("Not computing, by link (rate, delay each way)", fontsize=10)
    left.legend()
    steps = points[shown]["timeline_ms"]
    places = range(len(steps["other"]))
    base = [0.0] * len(places)
    for kind, colour in _COLOURS.items():
        right.bar(places, steps[kind], bottom=base, color=colour, width=1.0)
        base = [a + b for a, b in zip(base, steps[kind], strict=True)]
    right.set_xlabel("step")
    right.set_ylabel("ms between two steps of one second")
    right.set_title(f"{shown}: what a step takes beside computing", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _speed(shares: dict[str, Any]) -> float:
    return float(shares["steps_per_s"])
