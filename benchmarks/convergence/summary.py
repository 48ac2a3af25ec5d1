"""From finished runs to the figures that are reported; losses in nats per byte, held-out text."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.convergence.methods import METHODS, VARIANTS
from benchmarks.convergence.plan import Plan, Results
from benchmarks.simulator.run import CURVE_POINTS, EXPORTED_AT

Figures = list[dict[str, Any]]  # one entry per seed


def table(plan: Plan, results: Results) -> list[dict[str, Any]]:
    """One row per setting and tuned method: losses by seed, and what was sent."""
    rows = []
    for block in plan.blocks:
        for method in (*block.methods, *block.variants):
            found = plan.tuned(block.setting, method, results)
            if found is None:
                continue
            tuned_as = "spread" if method in VARIANTS else method
            rows.append(
                {
                    "setting": block.setting.name,
                    "method": method,
                    "rate": plan.rate(block.setting, tuned_as, results),
                    "mean": [round(f["mean"], 4) for f in found],
                    "peers": [round(statistics.fmean(f["peers"]), 4) for f in found],
                    "worst_peer": [round(max(f["peers"]), 4) for f in found],
                    "distance": [round(f["distance"], 4) for f in found],
                    "sent_share": round(found[0]["sent_share"], 4),
                    "steps": found[0]["steps"],
                    "curve": [f["curve"] for f in found],
                }
            )
            rows[-1] |= _closed(found)
    unique = {(row["setting"], row["method"]): row for row in rows}
    return list(unique.values())


def summary(plan: Plan, results: Results) -> dict[str, Any]:
    """The issue's keys, for the first setting; whatever is not finished is left out.

    `recovered` is (alone - spread) / (alone - synchronous), `alone` averaged over peers, and all
    differences are positive when something is worse.
    """
    out: dict[str, Any] = {}
    settings = list(dict.fromkeys(block.setting for block in plan.blocks))
    for setting in (s for s in settings if not s.clock):
        of = {m: plan.tuned(setting, m, results) for m in (*METHODS, *VARIANTS)}
        suffix = "" if setting == settings[0] else f"_n{setting.peers}_{setting.steps}"
        found = _against_baselines(of) | _exports(of)
        if setting == settings[0]:
            found |= _penalties(of)
        out |= {f"{key}{suffix}": value for key, value in found.items()}
    for setting in (s for s in settings if s.clock):
        out |= _barrier({m: plan.tuned(setting, m, results) for m in METHODS})
    return out


def _against_baselines(of: dict[str, Figures | None]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    spread, alone, together = of["spread"], of["alone"], of["synchronous"]
    if spread and alone and together:
        shares = [
            (_peers(a) - s["mean"]) / (_peers(a) - t["mean"])
            for s, a, t in zip(spread, alone, together, strict=True)
        ]
        gaps = _paired(spread, together)
        out |= {
            "recovered": round(statistics.fmean(shares), 4),
            "recovered_worst_seed": round(min(shares), 4),
            "spread_minus_synchronous": round(statistics.fmean(gaps), 4),
        }
    for key, other in (
        ("spread_minus_all_reduce", of["all-reduce"]),
        ("spread_minus_spread_all_reduce", of["spread all-reduce"]),
    ):
        if spread and other:
            out[key] = round(max(_paired(spread, other)), 4)
    if spread:
        out |= _closed(spread)
    return out


def _penalties(of: dict[str, Figures | None]) -> dict[str, float]:
    """Averages over paired seeds."""
    pairs = {
        "int8_penalty": (of["spread"], of["spread float32"]),
        "int4_penalty": (of["spread int4"], of["spread float32"]),
        "failure_cost": (of["spread, 30% failing"], of["spread"]),
        "late_1_cost": (of["spread, 1 step late"], of["spread"]),
        "late_2_cost": (of["spread, 2 steps late"], of["spread"]),
        "late_4_cost": (of["spread, 4 steps late"], of["spread"]),
    }
    return {
        key: round(statistics.fmean(_paired(one, other)), 4)
        for key, (one, other) in pairs.items()
        if one and other
    }


def _barrier(of: dict[str, Figures | None]) -> dict[str, float]:
    """Share of the loss that is saved at equal wall-clock, worst seed, against the best barrier."""
    spread = of["spread"]
    barriers = [found for name, found in of.items() if found and METHODS[name].barrier]
    if not spread or not barriers:
        return {}
    saved = [
        1 - s["mean"] / min(b["mean"] for b in others)
        for s, *others in zip(spread, *barriers, strict=True)
    ]
    against = of["all-reduce"]
    out = {"barrier_gain": round(min(saved), 4)}
    if against:
        shares = [1 - s["mean"] / a["mean"] for s, a in zip(spread, against, strict=True)]
        out["barrier_gain_all_reduce"] = round(min(shares), 4)
    return out


def _exports(of: dict[str, Figures | None]) -> dict[str, Any]:
    """Worst over seeds, moments and peers of export minus the all-reduce model at the same step."""
    spread, other = of["spread, exports"], of["all-reduce"]
    if not spread or not other:
        return {}
    worst: dict[str, float] = {}
    for s, a in zip(spread, other, strict=True):
        for part in EXPORTED_AT:
            reference = a["curve"][part - 1]["loss"]
            for name, losses in s["exports"][f"{part}/{CURVE_POINTS}"].items():
                excess = max(losses) - reference
                worst[name] = max(worst.get(name, excess), excess)
    return {"export_minus_all_reduce": {name: round(value, 4) for name, value in worst.items()}}


def _closed(found: Figures) -> dict[str, Any]:
    """How far peers are from one another after the closing consolidation."""
    ranges = [max(f["closed"]) - min(f["closed"]) for f in found if "closed" in f]
    return {"closed_range": round(max(ranges), 4)} if ranges else {}


def _paired(one: Figures, other: Figures) -> list[float]:
    return [a["mean"] - b["mean"] for a, b in zip(one, other, strict=True)]


def _peers(figures: dict[str, Any]) -> float:
    return statistics.fmean(figures["peers"])


def show(rows: list[dict[str, Any]]) -> str:
    """The rows as text; mean model / average of the peers."""
    lines = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        lines.append(f"-- {setting}")
        for row in rows:
            if row["setting"] == setting:
                seeds = "  ".join(
                    f"{m:.3f}/{p:.3f}" for m, p in zip(row["mean"], row["peers"], strict=True)
                )
                average = statistics.fmean(row["mean"])
                lines.append(
                    f"{row['method']:22} rate {row['rate']:<8g} mean {average:.4f}  {seeds}  "
                    f"sent {row['sent_share']:.3f}"
                )
    return "\n".join(lines)
