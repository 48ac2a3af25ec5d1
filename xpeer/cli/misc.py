"""`xpeer version` and `xpeer completion`."""

from __future__ import annotations

import importlib.metadata
import platform

import click
from click.shell_completion import get_completion_class

from xpeer import __version__
from xpeer.cli.common import echo_json, json_option

PACKAGES = ("torch", "transformers", "hivemind", "PyNaCl", "opacus", "dp-accounting")


@click.command()
@json_option
def version(as_json: bool) -> None:
    """Print the versions that matter in a bug report."""
    versions = {"xpeer": __version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in PACKAGES}
    if as_json:
        echo_json(versions)
        return
    for name, number in versions.items():
        click.echo(f"{name} {number}")


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for a shell, e.g. `xpeer completion bash > FILE`."""
    from xpeer.cli import main  # noqa: PLC0415 - it imports us, late

    kind = get_completion_class(shell)
    if kind is None:
        raise click.ClickException(f"click knows no completion for {shell}")
    click.echo(kind(main, {}, "xpeer", "_XPEER_COMPLETE").source())
