"""`xpeer demo`: the command and its options."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import click

from xpeer.cli.common import GivenPath, Whole, json_option
from xpeer.policies import PrivacyMode
from xpeer.source import check_folder


@click.command()
@json_option
@click.option(
    "--seed",
    type=Whole(0, 2**31),
    default=1,
    show_default=True,
    help="Of the public start's training, without --model.",
)
@click.option(
    "--model", type=GivenPath(),
    help="Hugging Face folder of a pretrained model, to train adapters (LoRA) of it. Default: a "
    "small model for bytes, which the demo makes.",
)  # fmt: skip
@click.option(
    "--privacy", type=click.Choice(get_args(PrivacyMode)), default="record", show_default=True,
    help="As of `xpeer init`: off shows what privacy costs.",
)  # fmt: skip
@click.option(
    "--out", type=GivenPath(), default=Path(".demo"), show_default=True,
    help="Folder for caches, homes, logs and the report.",
)  # fmt: skip
@click.option(
    "--quick",
    is_flag=True,
    help="One short swarm, nothing to compare it with: two minutes without --model.",
)
def demo(
    as_json: bool, seed: int, model: Path | None, privacy: PrivacyMode, out: Path, quick: bool
) -> None:
    """Run a real swarm of three peers on this machine, and compare it with training alone.

    One bootstrap node and three peers, each its own daemon, each on another kind of private text
    that is installed here anyway; differentially private, encrypted, without an aggregator.
    """
    if model is not None:
        model = model.absolute()
        check_folder(model, "--model")
    from xpeer.cli.demo import flow, plan  # noqa: PLC0415 - torch takes seconds to import

    chosen = plan.choose(model is not None, quick, privacy)
    began = time.monotonic()
    report = flow.Demo(out.absolute(), seed, chosen, model).run()
    report.seconds = round(time.monotonic() - began, 1)
    text = json.dumps(asdict(report), indent=2)
    (out / "report.json").write_text(text, encoding="utf-8")
    if as_json:
        click.echo(text)
