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
    help="Random seed of the public start's training, without --model.",
)
@click.option(
    "--model", type=GivenPath("folder", "model"),
    help="Hugging Face folder of a pretrained model whose adapters (LoRA) are trained. Default: a "
    "small model for bytes, which the demo makes.",
)  # fmt: skip
@click.option(
    "--privacy", type=click.Choice(get_args(PrivacyMode)), default="record", show_default=True,
    help="Privacy mode, as in `xpeer init`. off shows what privacy costs.",
)  # fmt: skip
@click.option(
    "--out", type=GivenPath("new"), default=Path(".demo"), show_default=True,
    help="Folder for caches, homes, logs and the report.",
)  # fmt: skip
@click.option(
    "--quick",
    is_flag=True,
    help="Run one short swarm, without a comparison: two minutes without --model.",
)
def demo(
    as_json: bool, seed: int, model: Path | None, privacy: PrivacyMode, out: Path, quick: bool
) -> None:
    """Run a real swarm of three peers on this machine, and compare it with training alone.

    It starts a bootstrap node and three daemons. Each trains on another kind of text that is
    installed here anyway. There is no aggregator; exchanges are encrypted, and private by default.
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
