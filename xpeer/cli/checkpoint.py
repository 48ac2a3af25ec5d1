"""`xpeer checkpoint`: what was saved. Only `save` needs a daemon that runs."""

from __future__ import annotations

import time
from pathlib import Path

import click

from xpeer.cli.common import echo_json, home_option, json_option, load_config, say
from xpeer.config import Home
from xpeer.control import Client
from xpeer.errors import ExitCode, LocalError
from xpeer.manifest import SignedManifest

SAVE_TIMEOUT_S = 120.0
"""The daemon waits for the step that runs."""


@click.group()
def checkpoint() -> None:
    """List, save, verify, export checkpoints."""


@checkpoint.command("list")
@home_option
@json_option
def list_command(home: Home, as_json: bool) -> None:
    """List the checkpoints in the home, newest first."""
    from xpeer.training.checkpoint import paths, step_of  # noqa: PLC0415 - torch takes seconds

    rows = []
    for path in paths(home.checkpoints):
        found = path.stat()
        rows.append(
            {
                "step": step_of(path),
                "path": str(path),
                "bytes": found.st_size,
                "saved_unix_s": found.st_mtime,
            }
        )
        if not as_json:
            saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.st_mtime))
            click.echo(f"step {step_of(path):<9} {saved}  {found.st_size / 1e6:9.2f} MB  {path}")
    if as_json:
        echo_json(rows)
    elif not rows:
        say(f"no checkpoints in {home.checkpoints}")


@checkpoint.command("save")
@home_option
def save_command(home: Home) -> None:
    """Have the running daemon save one now; print its path."""
    path = Client(home.socket(load_config(home)), SAVE_TIMEOUT_S).checkpoint()
    if path:
        click.echo(path)
    else:
        say("nothing to save: this node trains nothing yet")


@checkpoint.command("verify")
@home_option
@json_option
def verify_command(home: Home, as_json: bool) -> None:
    """Read every checkpoint in full and check its digest; exit 1 if one is damaged."""
    from xpeer.training.checkpoint import load, paths  # noqa: PLC0415 - torch takes seconds
    from xpeer.training.tensorfile import CorruptFileError  # noqa: PLC0415

    problems: dict[str, str] = {}
    for path in paths(home.checkpoints):
        try:
            load(path)
            problems[str(path)] = ""
        except (CorruptFileError, LocalError) as e:
            problems[str(path)] = str(e)
    if as_json:
        echo_json([{"path": path, "problem": problem} for path, problem in problems.items()])
    else:
        for name, problem in problems.items():
            click.echo(f"{name}  {f'damaged: {problem}' if problem else 'ok'}")
    if any(problems.values()):
        raise click.exceptions.Exit(int(ExitCode.ERROR))


@checkpoint.command("export")
@home_option
@click.option(
    "--hf",
    "folder",
    required=True,
    type=click.Path(path_type=Path),
    help="New folder for transformers' from_pretrained.",
)
def export_command(home: Home, folder: Path) -> None:
    """Write the newest checkpoint as a Hugging Face model with its tokenizer.

    It is this peer's model as its last checkpoint had it, averaged with what its last partners
    showed: near the swarm's mean, which all have after the closing windows.
    """
    # torch takes seconds
    from xpeer.training import model  # noqa: PLC0415
    from xpeer.training.checkpoint import load_latest  # noqa: PLC0415
    from xpeer.training.tokenizer import load_tokenizer  # noqa: PLC0415

    manifest = SignedManifest.load(home.manifest).open()
    tokenizer = load_tokenizer(manifest.tokenizer, load_config(home).data.tokenizer)
    bundle, warnings = load_latest(home.checkpoints)
    for warning in warnings:
        say(f"warning: {warning}")
    if bundle is None:
        raise LocalError(
            f"there is no checkpoint in {home.checkpoints}",
            "train first: `xpeer start`, or have a running daemon save: `xpeer checkpoint save`",
        )
    made = model.build(manifest.model.config)
    model.write_flat(made, bundle.consolidated())
    model.export_hf(made, tokenizer, folder)
    say(f"exported step {bundle.step}, {bundle.flat.numel()} parameters")
    click.echo(folder)
