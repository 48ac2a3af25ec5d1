"""The figures that are claimed, from those that were measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.aggregation.division import POLICIES

KEYS = ("loss", "loss_by_data", "accuracy", "gigabytes_per_cloud", "hours", "cost_usd")


def summary(methods: dict[str, dict[str, Any]], shares: dict[str, Any]) -> dict[str, Any]:
    """Means over seeds by method, and what division gains.

    Args:
        methods: `work.results`.
        shares: figures of `division.Run` by policy, under "steady" and "changing".
    """
    found: dict[str, Any] = {}
    for name, result in methods.items():
        label = name.lower().replace(" ", "_")
        for key in KEYS:
            value = statistics.fmean(run[key] for run in result["runs"])
            found[f"{label}_{key}"] = round(value, 4)
        found[f"{label}_rate"] = result["rate"]
    return found | _at_fedavgs_loss(methods) | _shares(shares)


def _at_fedavgs_loss(methods: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """Where the other methods reach what FedAvg ends at."""
    found: dict[str, float | None] = {}
    target = statistics.fmean(run["curve"][-1]["loss"] for run in methods["FedAvg"]["runs"])
    for name, result in methods.items():
        if name == "FedAvg":
            continue
        reached = [reach(run["curve"], target) for run in result["runs"]]
        label = name.lower().replace(" ", "_")
        for key in ("round", "cost_usd"):
            values = [point[key] for point in reached if point is not None]
            whole = len(values) == len(reached)
            found[f"{label}_{key}_at_fedavgs_loss"] = (
                round(statistics.fmean(values), 2) if whole else None
            )
    return found


def _shares(shares: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, suffix in (("steady", "_steady"), ("changing", "")):
        spans = {policy: shares[key][policy]["makespan_s"] for policy in POLICIES}
        for policy, span in spans.items():
            found[f"makespan_{policy}{suffix}"] = round(span)
            again = shares[key][policy]["trained_again"]
            found[f"trained_again_{policy}{suffix}"] = round(again, 3)
        found[f"equal_over_weighted{suffix}"] = round(spans["equal"] / spans["weighted"], 2)
        found[f"equal_over_dynamic{suffix}"] = round(spans["equal"] / spans["dynamic"], 2)
        found[f"weighted_over_dynamic{suffix}"] = round(spans["weighted"] / spans["dynamic"], 2)
    for policy in POLICIES:
        curve = shares["changing"][policy]["curve"]
        if curve:
            found[f"loss_{policy}"] = round(curve[-1]["loss"], 4)
    return found


def reach(curve: Sequence[dict[str, float]], target: float) -> dict[str, float] | None:
    """The first point at a loss, between measured ones on straight lines; None = never."""
    before: dict[str, float] | None = None
    for point in curve:
        if point["loss"] <= target:
            if before is None:
                return dict(point)
            share = (before["loss"] - target) / (before["loss"] - point["loss"])
            return {key: before[key] + share * (point[key] - before[key]) for key in point}
        before = point
    return None
