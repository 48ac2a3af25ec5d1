"""The drawing of results/scale.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt


def draw(details: dict[str, Any], path: Path) -> None:
    """Time to consensus, bytes until then, and the roster's traffic, against N."""
    figure, (slots, sent, roster) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    names = {
        (2, 0): "pairs",
        (4, 0): "groups of 4",
        (2, 4): "pairs, 4 zones apart at the start",
    }
    for (k, zones), name in names.items():
        rows = [r for r in details["consensus"] if (r["k"], r["zones"]) == (k, zones)]
        peers = [row["peers"] for row in rows]
        slots.plot(peers, [row["slots"] for row in rows], marker="o", label=name)
        sent.plot(peers, [row["bytes_per_peer"] / 1e3 for row in rows], marker="o", label=name)
    slots.set(title="Slots until the distance fell tenfold", xlabel="peers", xscale="log")
    slots.set_ylim(bottom=0)
    sent.set(title="kB sent by each peer until then", xlabel="peers", xscale="log")
    sent.set_ylim(bottom=0)
    slots.legend(frameon=False)
    rows = details["rosters"]
    peers = [row["peers"] for row in rows]
    roster.plot(peers, [row["bytes_per_peer_minute"] / 2e3 for row in rows], marker="o")
    roster.set(title="Roster: kB sent per peer and minute", xlabel="peers", xscale="log")
    roster.set_ylim(bottom=0)
    for axes in (slots, sent, roster):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
