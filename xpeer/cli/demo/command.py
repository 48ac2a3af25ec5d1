"""`xpeer demo`: the command and its options."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import click

from xpeer.cli.common import GivenPath, Whole, json_option


@click.command()
@json_option
@click.option(
    "--seed",
    type=Whole(0, 2**31),
    default=1,
    show_default=True,
    help="Of the public start's training.",
)
@click.option(
    "--out", type=GivenPath(), default=Path(".demo"), show_default=True,
    help="Folder for caches, homes, logs and the report.",
)  # fmt: skip
@click.option(
    "--quick", is_flag=True, help="One short swarm, nothing to compare it with: two minutes."
)
def demo(as_json: bool, seed: int, out: Path, quick: bool) -> None:
    """Run a real swarm of three peers on this machine, and compare it with training alone.

    One bootstrap node and three peers, each its own daemon, each on another kind of private text
    that is installed here anyway; differentially private, encrypted, without an aggregator.
    """
    from xpeer.cli.demo.flow import FULL, QUICK, Demo  # noqa: PLC0415 - torch takes seconds to import

    began = time.monotonic()
    report = Demo(out.absolute(), seed, QUICK if quick else FULL).run()
    report.seconds = round(time.monotonic() - began, 1)
    text = json.dumps(asdict(report), indent=2)
    (out / "report.json").write_text(text, encoding="utf-8")
    if as_json:
        click.echo(text)
