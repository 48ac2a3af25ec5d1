"""What every command shares: where the node lives, how it answers, how it fails.

stdout is data, stderr is for people. A command raises `LocalError` or `PeerError` and the root
group turns it into one line and the documented exit code; nothing here imports torch or hivemind.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from xpeer import config
from xpeer.config import Home, NodeConfig
from xpeer.errors import ConfigError, ExitCode, LocalError, PeerError

INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""

F = TypeVar("F", bound=Callable[..., Any])


def home_option(command: F) -> F:
    """Give a command `home: xpeer.config.Home` from --home, XPEER_HOME or the default."""
    return click.option(
        "--home",
        envvar="XPEER_HOME",
        default=str(config.DEFAULT_HOME),
        show_default=True,
        type=click.Path(path_type=Path),
        callback=_home,
        help="The node's folder (XPEER_HOME).",
    )(command)


def json_option(command: F) -> F:
    """Give a command `as_json: bool` from --json."""
    return click.option("--json", "as_json", is_flag=True, help="Machine-readable output.")(command)


def load_config(
    home: Home, overrides: Mapping[str, Any] | None = None, path: Path | None = None
) -> NodeConfig:
    """The node's settings from flags > XPEER_ variables > config.toml > defaults.

    Args:
        home: where config.toml is looked for; there it may be missing.
        overrides: flags as {"section.key": value}.
        path: a file that was named on the command line, and so must exist.

    Raises:
        ConfigError: names the key, the value and a remedy.
    """
    if path is not None and not path.exists():
        raise ConfigError(f"config {path} does not exist", "correct --config or leave it out")
    return config.load(path or home.config, os.environ, overrides)


def echo_json(value: Any) -> None:
    """Print a msgspec struct, dict or list as indented JSON on stdout."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2))


def say(line: str) -> None:
    """Tell a person something, on stderr."""
    click.echo(line, err=True)


@contextmanager
def error_boundary() -> Iterator[None]:
    """Turn what a command raises into one line on stderr and an exit code.

    Raises:
        click.exceptions.Exit: with the code; click ends the process with it.
    """
    try:
        yield
    except LocalError as e:
        _complain(str(e))
        raise click.exceptions.Exit(int(e.exit_code)) from e
    except PeerError as e:
        _complain(str(e))
        raise click.exceptions.Exit(int(ExitCode.ERROR)) from e
    except KeyboardInterrupt as e:
        raise click.exceptions.Exit(INTERRUPTED) from e


def _complain(message: str) -> None:
    say(f"xpeer: error: {' '.join(message.split())}")


def _home(_ctx: click.Context, _param: click.Parameter, value: Path) -> Home:
    home = Home(value)
    if home.path.exists() and not home.path.is_dir():
        raise ConfigError(f"home {home.path} is not a folder", "name another with --home")
    return home
