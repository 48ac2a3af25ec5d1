"""`xpeer plan`: which round fits a link, and why."""

from __future__ import annotations

from dataclasses import asdict

import click

from xpeer.cli.common import echo_json, json_option, say
from xpeer.errors import LocalError


@click.command()
@click.option("--params", type=float, required=True, help="Trained parameters, e.g. 135e6.")
@click.option(
    "--link-mbit", type=float, required=True, help="Bandwidth in the slower direction, Mbit/s."
)
@click.option(
    "--step-seconds", type=float, required=True, help="Time of a step on the fastest peer."
)
@click.option(
    "--round-trip-ms", type=float, default=50.0, show_default=True, help="Time to a peer and back."
)
@click.option("--peers", type=int, default=4, show_default=True, help="Peers in the swarm.")
@json_option
def plan(
    params: float,
    link_mbit: float,
    step_seconds: float,
    round_trip_ms: float,
    peers: int,
    as_json: bool,
) -> None:
    """Say which fragments, window and codec suit a link, so that no step waits for it.

    Prints the options for `xpeer init --swarm`, and on stderr the reasons.
    """
    from xpeer.wire import link_plan  # noqa: PLC0415 - imports torch

    for option, value, least, most in (
        ("--params", params, 1, 1e15),
        ("--link-mbit", link_mbit, 1e-3, 1e9),
        ("--step-seconds", step_seconds, 1e-6, 1e7),
        ("--round-trip-ms", round_trip_ms, 0, 1e7),
        ("--peers", peers, 1, 1e6),
    ):
        if not least <= value <= most:  # NaN is refused as well
            raise LocalError(f"{option} {value} makes no sense", f"{least:g} to {most:g}")
    link = link_plan.Bandwidth(bits_per_s=link_mbit * 1e6, round_trip_s=round_trip_ms / 1e3)
    chosen = link_plan.plan(link, num_params=int(params), step_s=step_seconds, peers=peers)
    if as_json:
        echo_json(asdict(chosen))
        return
    say(chosen.why)
    fields = {
        "round.fragments": chosen.fragments,
        "round.window_steps": chosen.window_steps,
        "round.slot_s": round(chosen.slot_s, 3),
        "round.codec": chosen.codec,
    }
    click.echo(" ".join(f"--set {name}={value}" for name, value in fields.items()))
