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
        "rate": plan.rate,
        "swarm": {peer.corpus: peer.swarm_by_kind for peer in report.peers},
        "alone": {peer.corpus: peer.alone_by_kind for peer in report.peers},
        "rates": {peer.corpus: peer.alone_learning_rate for peer in report.peers},
        "loss_start": report.loss_start,
        "loss_swarm": max(peer.loss_swarm for peer in report.peers),
        "losses_alone": {peer.corpus: peer.loss_alone for peer in report.peers},
        "loss_alone_averaged": report.loss_alone_averaged,
        "loss_exported": report.loss_exported,
        "epsilon": report.epsilon,
        "steps": [peer.steps for peer in report.peers],
        "exchanges": [peer.exchanges for peer in report.peers],
        "trained": trained,
        "warned_of_noise": privacy_policy(case.privacy).charges and signal.drowns(norm, plan.steps),
        "seconds": report.seconds,
    }


def best_of(case: Case, runs: Sequence[Row]) -> Row:
    """One row of the runs of a case with the same seed: the best swarm, and the best lone peers.

    The exact average of lone peers is the best of the runs'.
    """
    swarm = min(runs, key=lambda run: run["loss_swarm"])
    alone = {
        peer: min(runs, key=lambda run, name=peer: run["losses_alone"][name])  # type: ignore[misc]
        for peer in swarm["swarm"]
    }
    rates = {peer: run["rates"][peer] for peer, run in alone.items()}
    tried = sorted({rate for _, lone in case.rates for rate in lone})
    return {
        **swarm,
        "alone": {peer: run["alone"][peer] for peer, run in alone.items()},
        "rates": rates,
        "loss_alone": min(run["losses_alone"][peer] for peer, run in alone.items()),
        "loss_alone_averaged": min(run["loss_alone_averaged"] for run in runs),
        "at_an_edge": [peer for peer, rate in rates.items() if rate in (tried[0], tried[-1])],
        "rate_at_an_edge": swarm["rate"] in (case.rates[0][0], case.rates[-1][0]),
        "runs": runs,
    }


def summary_of(rows: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Nats per token that the swarm's worst peer gains, seed by seed, and whether `init` warned.

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
            gains = [round(row[against] - row["loss_swarm"], 4) for row in seeds]
            found[f"{name}_{key}"] = gains
        found[f"{name}_warned_of_noise"] = any(row["warned_of_noise"] for row in seeds)
    return found


def table(rows: Mapping[str, Sequence[Row]]) -> str:
    """For people: losses on everybody's text, one seed after the other."""
    heads = f"{'case':12} {'start':>8} {'best alone':>11} {'averaged':>9} {'swarm':>8} {'rate':>8}"
    lines = [f"{heads}  notes"]
    for name, seeds in rows.items():
        for row in seeds:
            notes = ["noise drowns the signal"] * row["warned_of_noise"]
            notes += [f"lone rates at an edge: {', '.join(row['at_an_edge'])}"] * bool(
                row["at_an_edge"]
            )
            lines.append(
                f"{name:12} {row['loss_start']:8.4f} {row['loss_alone']:11.4f} "
                f"{row['loss_alone_averaged']:9.4f} {row['loss_swarm']:8.4f} {row['rate']:8.2g}  "
                f"{'; '.join(notes)}"
            )
    return "\n".join(lines)
