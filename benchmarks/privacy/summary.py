"""From finished jobs to the figures that are reported; losses in nats per byte, held-out text."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from benchmarks.privacy import bounds, lira
from benchmarks.privacy.attacked import REPEATS, Attacked
from benchmarks.privacy.plan import FIRST_EPSILON, METHODS, Plan
from benchmarks.privacy.setting import kinds
from benchmarks.privacy.utility import Utility
from benchmarks.privacy.work import Known

Row = dict[str, Any]
VIEWS = ("released", "partner")


def utility(plan: Plan, known: Known) -> list[Row]:
    """One row for each epsilon and method: losses by seed."""
    rows = []
    for epsilon in plan.epsilons:
        for method, peer in METHODS:
            jobs = plan.final(method, peer, epsilon, known)
            label = "swarm" if method == "swarm" else f"alone: {kinds()[peer]}"
            rows += _row(jobs, known, label)
    return rows


def _row(jobs: list[Utility] | None, known: Known, label: str) -> list[Row]:
    if jobs is None or any(job not in known for job in jobs):
        return []
    figures = [known[job] for job in jobs]
    return [
        {
            "method": label,
            "epsilon": jobs[0].epsilon,
            "rate": jobs[0].rate,
            "loss": [statistics.fmean(f["report"]) for f in figures],
            "worst_peer": [max(f["report"]) for f in figures],
            "best_peer": [min(f["report"]) for f in figures],
            "start": [f["start"] for f in figures],
            "epsilon_spent": [f["epsilon_spent"] for f in figures],
        }
    ]


def attacks(plan: Plan, known: Known) -> list[Row]:
    """One row for each epsilon and what the attacker sees; seeds together."""
    rows = []
    for epsilon in _epsilons(plan):
        jobs = [plan.attacked(epsilon, seed) for seed in range(plan.audits)]
        done = [(job, known[job]) for job in jobs if job in known]
        rows += [_attack_row(epsilon, view, done) for view in VIEWS if done]
    return rows


def _attack_row(epsilon: float | None, view: str, done: list[tuple[Attacked, Row]]) -> Row:
    coins = done[0][0].coins
    scores = np.array([figures[view]["scores"] for _, figures in done])
    losses = np.array([figures[view]["losses"] for _, figures in done])
    included = np.array([figures["included"] for _, figures in done], dtype=bool)
    of_members = scores[:, coins:], included[:, coins:]
    row: Row = {
        "epsilon": epsilon,
        "view": view,
        "claimed": [figures["epsilon_spent"] for _, figures in done],
        "one_run_bound": [
            bounds.one_run_audit(s[:coins], i[:coins], figures["delta"])
            for s, i, (_, figures) in zip(scores, included, done, strict=True)
        ],
        "coins_area": _area(scores[:, :coins], included[:, :coins]),
        "members_area": _area(*of_members),
        "members_found_at_1%": bounds.found_at(
            of_members[0][of_members[1]], of_members[0][~of_members[1]]
        ),
        "exposure": {
            str(k): statistics.fmean(figures[view]["exposure"][str(k)] for _, figures in done)
            for k in REPEATS
        },
    }
    if len(done) > 2:
        ratios = lira.ratios(losses[:, coins:], included[:, coins:])
        row["lira_area"] = _area(ratios, included[:, coins:])
        row["lira_found_at_1%"] = bounds.found_at(
            ratios[included[:, coins:]], ratios[~included[:, coins:]]
        )
    return row


def _area(scores: bounds.Floats, included: lira.Flags) -> float:
    return bounds.area(scores[included], scores[~included])


def whitebox(plan: Plan, known: Known) -> list[Row]:
    """One row for each epsilon, without and with sampling."""
    jobs = [job for epsilon in _epsilons(plan) for job in plan.whiteboxes(epsilon)]
    return [
        {"epsilon": job.epsilon, "batch": job.batch, **known[job]} for job in jobs if job in known
    ]


def inversion(plan: Plan, known: Known) -> list[Row]:
    """One row for each epsilon."""
    jobs = [plan.inversion(epsilon) for epsilon in _epsilons(plan)]
    return [{"epsilon": job.epsilon, **known[job]} for job in jobs if job in known]


def summary(rows: dict[str, list[Row]], lora: Row | None) -> dict[str, Any]:
    """What is claimed; a key is missing while its jobs are."""
    found: dict[str, Any] = _gains(rows["utility"])
    pairs = [
        (bound, claimed)
        for row in rows["attacks"]
        for bound, claimed in zip(row["one_run_bound"], row["claimed"], strict=True)
        if claimed is not None
    ]
    for row in rows["whitebox"]:
        if row["epsilon"] is not None:
            pairs += [(row[key], row["claimed"]) for key in ("bound", "bound_within_family")]
    found["audit_violations"] = sum(bound > claimed for bound, claimed in pairs)
    found["audit_bounds"] = len(pairs)
    tight = [
        row["bound_within_family"] / row["claimed"]
        for row in rows["whitebox"]
        if row["epsilon"] is not None
    ]
    if tight:
        found["audit_tightness"] = round(max(tight), 3)
    for row in rows["attacks"]:
        name = f"{row['view']}_{_name(row['epsilon'])}"
        found[f"members_area_{name}"] = round(row["members_area"], 3)
        found[f"exposure_{name}"] = round(row["exposure"]["1"], 2)
    for row in rows["inversion"]:
        found[f"text_recovered_{_name(row['epsilon'])}"] = round(row["text"], 3)
    if lora and "report" in lora:
        found["lora_135m_gain"] = round(lora["start"] - max(lora["report"]), 4)
    return found


def _gains(rows: list[Row]) -> dict[str, float]:
    """Worst peer and seed, at the epsilon that is claimed."""
    at = [row for row in rows if row["epsilon"] == FIRST_EPSILON]
    swarms = [row for row in at if row["method"] == "swarm"]
    alone = [row for row in at if row["method"].startswith("alone")]
    if not swarms:
        return {}
    worst = swarms[0]["worst_peer"]
    over_start = [s - w for s, w in zip(swarms[0]["start"], worst, strict=True)]
    out = {"gain_over_start": round(min(over_start), 4)}
    if len(alone) == len(METHODS) - 1:
        over = [a - w for row in alone for a, w in zip(row["loss"], worst, strict=True)]
        out["gain_over_alone"] = round(min(over), 4)
    return out


def _epsilons(plan: Plan) -> tuple[float | None, ...]:
    return plan.attacked_epsilons


def _name(epsilon: float | None) -> str:
    return "off" if epsilon is None else f"eps{epsilon:g}"


def show(rows: dict[str, list[Row]]) -> str:
    """As text."""
    lines = []
    for row in rows["utility"]:
        losses = "  ".join(f"{loss:.3f}" for loss in row["loss"])
        lines.append(
            f"{_name(row['epsilon']):6} {row['method']:20} rate {row['rate']:<6g} {losses}"
        )
    for row in rows["attacks"]:
        lines.append(
            f"{_name(row['epsilon']):6} {row['view']:9} exposure "
            + ", ".join(f"{k}x {bits:.1f}" for k, bits in row["exposure"].items())
            + f"  coins {row['coins_area']:.3f}  members {row['members_area']:.3f}"
            + f"  LiRA {row.get('lira_area', float('nan')):.3f}"
            + f"  bound {max(row['one_run_bound']):.2f}"
        )
    for row in rows["whitebox"]:
        lines.append(
            f"{_name(row['epsilon']):6} white box, batch {row['batch']}: bound {row['bound']:.2f}, "
            f"within the family {row.get('bound_within_family', float('nan')):.2f}"
        )
    for row in rows["inversion"]:
        lines.append(f"{_name(row['epsilon']):6} inversion: {row['text']:.1%} of the text")
    return "\n".join(lines)
