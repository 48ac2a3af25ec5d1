"""Draws the results: loss, exposure and membership, and bounds against epsilon."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes

mpl.use("Agg")

from matplotlib import pyplot as plt

Row = dict[str, Any]
_PLACES = {2.0: 0, 8.0: 1, None: 2}
_LABELS = ("2", "8", "off")


def draw(rows: dict[str, list[Row]], path: Path) -> None:
    """Three panels over epsilon.

    Args:
        rows: by table, as `summary` makes them.
        path: of the PNG.
    """
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    _losses(axes[0], rows["utility"])
    _attacks(axes[1], rows["attacks"])
    _bounds(axes[2], rows["whitebox"])
    for axis in axes[:2]:
        axis.set_xticks(range(3), _LABELS)
    for axis in axes:
        axis.set_xlabel("epsilon")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _losses(axis: Axes, rows: list[Row]) -> None:
    for method in dict.fromkeys(row["method"] for row in rows):
        points = sorted(
            (_PLACES[row["epsilon"]], statistics.fmean(row["loss"]))
            for row in rows
            if row["method"] == method
        )
        wide = 3 if method == "swarm" else 1.3
        axis.plot(*zip(*points, strict=True), label=method, linewidth=wide, marker="o", ms=3)
    starts = [statistics.fmean(row["start"]) for row in rows]
    if starts:
        axis.axhline(statistics.fmean(starts), color="grey", ls="--", label="public start")
    axis.set_ylabel("nats per byte, everybody's held-out text")


def _attacks(axis: Axes, rows: list[Row]) -> None:
    keys = {"members_area": "real records, loss", "lira_area": "real records, LiRA",
            "coins_area": "random records, loss"}  # fmt: skip
    for view in ("released", "partner"):
        of_view = [row for row in rows if row["view"] == view]
        for key, label in keys.items():
            points = sorted((_PLACES[r["epsilon"]], r[key]) for r in of_view if key in r)
            if points:
                style = "-" if view == "released" else ":"
                axis.plot(*zip(*points, strict=True), style, label=f"{label}; {view}", marker="o")
    axis.axhline(0.5, color="grey", ls="--", label="guessing")
    axis.set_ylabel("membership: area under the curve")


def _bounds(axis: Axes, rows: list[Row]) -> None:
    private = [row for row in rows if row["epsilon"] is not None]
    for batch in sorted({row["batch"] for row in private}):
        points = sorted(
            (row["claimed"], row["bound_within_family"]) for row in private if row["batch"] == batch
        )
        axis.plot(*zip(*points, strict=True), label=f"canary gradient, batch {batch}", marker="o")
    axis.plot([0, 8], [0, 8], color="grey", ls="--", label="claimed")
    axis.set_ylabel("lower bound on epsilon from attacks")
