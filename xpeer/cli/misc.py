"""`xpeer version` and `xpeer completion`."""

from __future__ import annotations

import platform

import click

from xpeer import __version__
from xpeer.cli.common import echo_json, json_option
from xpeer.status import SCHEMA_VERSION

PACKAGES = ("torch", "transformers", "hivemind", "PyNaCl", "dp-accounting")
"""Versions that a bug report needs; read from their metadata, nothing is imported."""


@click.command()
@json_option
def version(as_json: bool) -> None:
    """Print the versions of xpeer and of the packages that it depends on most."""
    import importlib.metadata  # noqa: PLC0415 - slow, and only this command needs it

    versions = {"xpeer": __version__, "python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in PACKAGES}
    if as_json:
        echo_json({"schema_version": SCHEMA_VERSION, **versions})
    else:
        click.echo("\n".join(f"{name} {number}" for name, number in versions.items()))


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a shell's completion script, e.g. `xpeer completion bash > FILE`."""
    from click.shell_completion import get_completion_class  # noqa: PLC0415 - only here

    from xpeer.cli import main  # noqa: PLC0415 - it imports us, late

    kind = get_completion_class(shell)
    if kind is None:
        raise click.ClickException(f"click knows no completion for {shell}")
    click.echo(kind(main, {}, "xpeer", "_XPEER_COMPLETE").source())
