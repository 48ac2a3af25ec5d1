"""What `xpeer privacy plan` prints: one plan in sentences, or a table of several."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from xpeer.accounts import signal
from xpeer.cli.common import say

if TYPE_CHECKING:
    from xpeer.accounts.planning import Plan


def print_table(plans: list[Plan]) -> None:
    """Print plans with several batches, to choose from."""
    click.echo(
        f"{'batch':>8} {'q':>10} {'sigma':>8} {'sigma/batch':>12} {'noise norm':>11} "
        f"{'tokens/step':>12} {'passes':>8}"
    )
    for each in plans:
        norm = f"{each.noise_norm:.3g}" if each.noise_norm else "-"
        click.echo(
            f"{each.batch:8d} {each.sampling_probability:10.3g} {each.noise_multiplier:8.3f} "
            f"{each.noise_to_signal:12.3g} {norm:>11} {each.tokens_per_step or 0:12,d} "
            f"{each.passes:8.2f}"
        )
    say("sigma/batch and noise norm: relative to C, the largest possible norm of a mean gradient")
    for each in plans:
        _warn_of_noise(each)


def _warn_of_noise(plan: Plan) -> None:
    if plan.noise_norm and signal.drowns(plan.noise_norm, plan.steps):
        say(
            f"warning: with {plan.batch} {plan.unit}s a step the noise is {plan.noise_norm:.3g} "
            f"times the signal: next to nothing is learnt - {signal.REMEDY}"
        )


def print_plan(plan: Plan) -> None:
    """Print one plan, and on stdout the options for `xpeer init --swarm`."""
    tokens = f", {plan.tokens_per_step:,} tokens a step" if plan.tokens_per_step else ""
    norm = f" and {plan.noise_norm:.3g} C over all parameters" if plan.noise_norm else ""
    say(
        f"{plan.steps} steps of {plan.batch} {plan.unit}s each, of {plan.records:,} in all: "
        f"{plan.passes:.2f} passes{tokens}"
    )
    say(
        f"with noise {plan.noise_multiplier:g} they spend epsilon {plan.epsilon:g} at delta "
        f"{plan.delta:.3g}"
    )
    say(
        f"the noise in a mean gradient is {plan.noise_to_signal:.3g} C in each coordinate{norm}; "
        "the gradient's own norm is at most C"
    )
    _warn_of_noise(plan)
    unit = " --set privacy.unit=document" if plan.unit == "document" else ""
    say("epsilon on the way: " + ", ".join(f"{eps:.2f} after {steps}" for steps, eps in plan.curve))
    click.echo(
        f"--set privacy.epsilon={plan.epsilon:g} --set privacy.delta={plan.delta:.6g} "
        f"--set privacy.noise_multiplier={plan.noise_multiplier:g} "
        f"--set optimiser.batch_records={plan.batch} --set end.steps={plan.steps}{unit}"
    )
