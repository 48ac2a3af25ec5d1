"""`xpeer privacy`: what was spent, what a budget asks for, and whether the sums are right."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from xpeer.cli.common import echo_json, home_option, json_option, say
from xpeer.config import Home
from xpeer.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from xpeer.privacy.ledger import Ledger
    from xpeer.privacy.report import Account, Plan

BATCHES = (32, 128, 512, 2048, 8192)
"""Tried where --batch is missing."""


@click.group()
def privacy() -> None:
    """What was spent of the privacy budget, and how to plan, report and verify it."""


@privacy.command("status")
@home_option
@json_option
def status_command(home: Home, as_json: bool) -> None:
    """Say what this node's ledger has been charged; the daemon need not run."""
    from xpeer.privacy import report  # noqa: PLC0415 - slow to import

    with _looked(home) as ledger:
        found = report.account(ledger)
    if as_json:
        echo_json(found)
        return
    for label, text in _rows(found):
        click.echo(f"{label:12}{text}")
    say("not covered: " + "; ".join(report.NOT_COVERED))


@privacy.command("plan")
@click.option("--epsilon", type=float, default=8.0, show_default=True)
@click.option("--delta", type=float, help="Default: min(1e-5, records^-1.1).")
@click.option("--records", type=int, required=True, help="Training sequences in the shard.")
@click.option("--batch", type=int, help="Expected records a step; default: a table of some.")
@click.option("--steps", type=int, help="Private steps in all.")
@click.option("--rounds", type=int, help="Or windows, of --window-steps steps each.")
@click.option("--window-steps", type=int, default=5, show_default=True)
@click.option("--sequence-tokens", type=int, help="Of a record, to tell a step's tokens.")
@json_option
def plan_command(
    epsilon: float,
    delta: float | None,
    records: int,
    batch: int | None,
    steps: int | None,
    rounds: int | None,
    window_steps: int,
    sequence_tokens: int | None,
    as_json: bool,
) -> None:
    """Say how much noise a budget asks for, before a swarm is founded.

    Prints the options for `xpeer init --swarm`; without --batch, a table to choose from: the noise
    in a mean gradient falls with the batch, and a step costs as many tokens more.
    """
    from xpeer.privacy import report  # noqa: PLC0415 - slow to import

    if (steps is None) == (rounds is None):
        raise ConfigError("--steps and --rounds: one of them is needed", "e.g. --steps 2000")
    total = steps if steps is not None else (rounds or 0) * window_steps
    sizes = [batch] if batch is not None else [b for b in BATCHES if b <= records] or [records]
    plans = [
        report.plan(
            epsilon=epsilon,
            records=records,
            batch=size,
            steps=total,
            delta=delta,
            sequence_tokens=sequence_tokens,
        )
        for size in sizes
    ]
    if as_json:
        echo_json(plans)
    elif batch is None:
        _table(plans)
    else:
        _explain(plans[0])


@privacy.command("report")
@home_option
@json_option
def report_command(home: Home, as_json: bool) -> None:
    """Write what an auditor needs to recompute epsilon, as Markdown or JSON."""
    from xpeer.privacy import report  # noqa: PLC0415 - slow to import

    with _looked(home) as ledger:
        found, verdict = report.account(ledger), report.verify(ledger)
        charges = ledger.charges()
    if as_json:
        echo_json({"account": found, "verdict": verdict, "charges": charges})
    else:
        click.echo(report.report(found, verdict, charges), nl=False)


@privacy.command("verify")
@home_option
@click.option("--ledger", "path", type=click.Path(path_type=Path), help="Another ledger.sqlite.")
@click.option("--delta", type=float, help="Default: as noted in the ledger.")
@json_option
def verify_command(home: Home, path: Path | None, delta: float | None, as_json: bool) -> None:
    """Check the chain of charges and recompute epsilon independently; exit 1 if they disagree."""
    from xpeer.privacy import report  # noqa: PLC0415 - slow to import

    if delta is not None and not 0 < delta < 1:
        raise ConfigError(f"--delta {delta} is not between 0 and 1", "e.g. --delta 1e-5")
    with _looked(home, path) as ledger:
        verdict = report.verify(ledger, delta)
    if as_json:
        echo_json(verdict)
    else:
        click.echo(
            f"{verdict.charges} charges, an unbroken chain; epsilon at delta {verdict.delta:.3g}: "
            f"accountant {verdict.epsilon_accountant:.4f}, replayed "
            f"{verdict.epsilon_replayed:.4f}, Renyi {verdict.epsilon_rdp:.4f}"
        )
    for problem in verdict.problems:
        say(f"xpeer: error: {problem}")
    if verdict.problems:
        raise click.exceptions.Exit(int(ExitCode.ERROR))


@contextmanager
def _looked(home: Home, path: Path | None = None) -> Iterator[Ledger]:
    from xpeer.privacy.ledger import Ledger  # noqa: PLC0415 - imports cryptography

    with Ledger.look(path or home.ledger_db) as ledger:
        yield ledger


def _rows(found: Account) -> Iterator[tuple[str, str]]:
    left = max(0.0, found.epsilon_target - found.epsilon_spent)
    yield "mode", f"{found.mode}, per {found.unit}"
    yield (
        "spent",
        f"epsilon {found.epsilon_spent:.4f} of {found.epsilon_target:g} at delta "
        f"{found.delta:.3g}; {left:.4f} or {found.steps_left} steps left",
    )
    for segment in found.segments:
        yield (
            "steps",
            f"{segment.steps} with noise {segment.noise_multiplier:g}, sampling probability "
            f"{segment.sampling_probability:.6g}",
        )
    ends = found.ends_unix_s
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(ends)) if ends else "not training now"
    yield "ends", when
    yield "ledger", f"{found.ledger_id}, {found.charges} charges, head {found.chain_head[:16]}"


def _table(plans: list[Plan]) -> None:
    click.echo(f"{'batch':>8} {'q':>10} {'sigma':>8} {'sigma/batch':>12} {'passes':>8}")
    for each in plans:
        click.echo(
            f"{each.batch:8d} {each.sampling_probability:10.3g} {each.noise_multiplier:8.3f} "
            f"{each.noise_to_signal:12.3g} {each.passes:8.2f}"
        )


def _explain(plan: Plan) -> None:
    tokens = f", {plan.tokens_per_step:,} tokens a step" if plan.tokens_per_step else ""
    say(
        f"{plan.steps} steps of {plan.batch} records in {plan.records:,} ({plan.passes:.2f} "
        f"passes{tokens}) spend epsilon {plan.epsilon:g} at delta {plan.delta:.3g} with noise "
        f"{plan.noise_multiplier:g}: {plan.noise_to_signal:.3g} C in each coordinate of the mean "
        "gradient, whose records weigh C / batch at most"
    )
    say("on the way: " + ", ".join(f"{eps:.2f} after {steps}" for steps, eps in plan.curve))
    click.echo(
        f"--set privacy.epsilon={plan.epsilon:g} --set privacy.delta={plan.delta:.6g} "
        f"--set privacy.noise_multiplier={plan.noise_multiplier:g} "
        f"--set optimiser.batch_records={plan.batch} --set end.steps={plan.steps}"
    )
