"""From the demo's reports to figures and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.llm.cases import Case
from xpeer.accounts import signal
from xpeer.cli.demo.plan import DemoPlan
from xpeer.cli.demo.report import Report
from xpeer.policies import privacy_policy

Row = dict[str, Any]


def row_of(case: Case, plan: DemoPlan, report: Report, trained: int) -> Row:
    """What is kept of a run.

    Args:
        case: of the run.
        plan: of the run.
        report: the demo's.
        trained: number of trained values.
    """
    norm = signal.noise_norm(signal.SIGMA_LEAST, plan.batch_records, trained)
    return {
        "start": report.start_by_kind,
        "swarm": {peer.corpus: peer.swarm_by_kind for peer in report.peers},
        "alone": {peer.corpus: peer.alone_by_kind for peer in report.peers},
        "rates": {peer.corpus: peer.alone_learning_rate for peer in report.peers},
        "loss_start": report.loss_start,
        "loss_swarm": max(peer.loss_swarm for peer in report.peers),
        "loss_alone": min(peer.loss_alone or float("inf") for peer in report.peers),
        "loss_alone_averaged": report.loss_alone_averaged,
        "loss_exported": report.loss_exported,
        "epsilon": report.epsilon,
        "steps": [peer.steps for peer in report.peers],
        "exchanges": [peer.exchanges for peer in report.peers],
        "trained": trained,
        "warned_of_noise": privacy_policy(case.privacy).charges and signal.drowns(norm, plan.steps),
        "seconds": report.seconds,
    }


def summary_of(rows: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Nats per token that the swarm's worst peer gains, in the worst seed.

    Args:
        rows: by the case's name, one a seed.
    """
    found: dict[str, Any] = {}
    for name, seeds in rows.items():
        for key, against in (
            ("over_start", "loss_start"),
            ("over_best_alone", "loss_alone"),
            ("over_averaged", "loss_alone_averaged"),
        ):
            found[f"{name}_{key}"] = min(row[against] - row["loss_swarm"] for row in seeds)
        found[f"{name}_warned_of_noise"] = any(row["warned_of_noise"] for row in seeds)
    return found


def table(rows: Mapping[str, Sequence[Row]]) -> str:
    """For people: losses on everybody's text, one seed after the other."""
    lines = [f"{'case':12} {'start':>8} {'best alone':>11} {'averaged':>9} {'swarm':>8}  noise"]
    for name, seeds in rows.items():
        for row in seeds:
            noise = "drowns the signal" if row["warned_of_noise"] else ""
            lines.append(
                f"{name:12} {row['loss_start']:8.4f} {row['loss_alone']:11.4f} "
                f"{row['loss_alone_averaged']:9.4f} {row['loss_swarm']:8.4f}  {noise}"
            )
    return "\n".join(lines)
