"""What every command shares: where the node lives, how it answers, how it fails.

stdout is data, stderr is for people. A command raises `LocalError` or `PeerError` and the root
group turns it into one line and the documented exit code; nothing here imports torch or hivemind.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from xpeer import config
from xpeer.config import Home, NodeConfig
from xpeer.errors import ConfigError, ExitCode, LocalError, PeerError
from xpeer.escape import hidden, json_text, one_line, visible
from xpeer.files import secure
from xpeer.paths import checked, checked_home, checked_text

HOME_VARIABLE = "XPEER_HOME"
_HOME = "xpeer.home"
"""Where a command's context, and so its parents', keeps its home."""
INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""


class GivenPath(click.Path):
    """A path option; an empty one never comes to mean the current folder."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(
        self,
        value: Any,
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Any:
        """A `Path`, `~` expanded."""
        checked(_name_of(param), os.fspath(value))
        return Path(os.fsdecode(super().convert(value, param, ctx))).expanduser()


class GivenText(click.ParamType[str]):
    """A file, folder or glob of text to train on, as `str`; or what another check allows."""

    name = "path"

    def __init__(self, check: Callable[[str, str], str] = checked_text) -> None:
        self._check = check

    def convert(self, value: Any, param: click.Parameter | None, _ctx: click.Context | None) -> str:
        """As it was given."""
        return self._check(_name_of(param), str(value))


class Number(click.FloatRange):
    """A finite number in bounds; another one is an error of a setting, exit code 8."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Also refuse what no comparison refuses."""
        with _bad_values(param):
            number = float(super().convert(value, param, ctx))
            if not math.isfinite(number):
                self.fail(f"{value} is no finite number.", param, ctx)
        return number


class Whole(click.IntRange):
    """The same for whole numbers."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """As click does."""
        with _bad_values(param):
            return int(super().convert(value, param, ctx))


@contextmanager
def _bad_values(param: click.Parameter | None) -> Iterator[None]:
    try:
        yield
    except click.BadParameter as e:
        raise ConfigError(f"{_name_of(param)}: {e.message.rstrip('.')}", "correct it") from e


def _name_of(param: click.Parameter | None) -> str:
    return param.opts[0] if param is not None else "a path"


F = TypeVar("F", bound=Callable[..., Any])


def home_option(command: F) -> F:
    """Give a command `home: xpeer.config.Home` from --home, XPEER_HOME or the default."""
    return click.option(
        "--home",
        envvar=HOME_VARIABLE,
        default=str(config.DEFAULT_HOME),
        show_default=True,
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
    click.echo(json_text(value, indent=2))


def echo(line: str) -> None:
    """Print a line of what was asked for, on stdout."""
    click.echo(visible(line))


def echo_text(text: str) -> None:
    """Print text of several lines, e.g. what a model wrote, on stdout."""
    click.echo("\n".join("\t".join(map(visible, x.split("\t"))) for x in text.split("\n")))


def say(line: str) -> None:
    """Tell a person something, on stderr."""
    click.echo(visible(line), err=True)


def say_foreign() -> None:
    """Say which variables with our prefix were taken for somebody else's."""
    if note := config.note_of_foreign(os.environ):
        say(f"note: {note}")


def secure_home(home: Home) -> None:
    """Close a home to others, before anything is written to it; what was closed is said.

    Raises:
        ConfigError: others may write to it.
    """
    for note in secure(home):
        say(f"note: {note}")


@contextmanager
def error_boundary(ctx: click.Context | None = None) -> Iterator[None]:
    """Turn what a command raises into one line on stderr and an exit code.

    What was not raised on purpose is a fault of ours: its trace goes to the log of the home, if the
    command got as far as one.

    Raises:
        click.exceptions.Exit: with the code; click ends the process with it.
    """
    try:
        yield
    except (click.exceptions.Exit, click.Abort):
        raise
    except click.ClickException as e:
        if isinstance(e, click.exceptions.NoArgsIsHelpError):
            raise
        used: click.Context | None = getattr(e, "ctx", None)
        path = used.command_path if used is not None else "xpeer"
        _complain(f"{e.format_message().rstrip('.')} - see `{path} --help`")
        raise click.exceptions.Exit(e.exit_code) from e
    except LocalError as e:
        _complain(str(e))
        raise click.exceptions.Exit(int(e.exit_code)) from e
    except PeerError as e:
        _complain(str(e))
        raise click.exceptions.Exit(int(ExitCode.ERROR)) from e
    except KeyboardInterrupt as e:
        raise click.exceptions.Exit(INTERRUPTED) from e
    except Exception as e:
        if isinstance(e, OSError) and e.errno == errno.EPIPE:
            raise  # whoever read our output has gone: click ends without a word
        _complain(f"a fault of xpeer: {type(e).__name__}: {e} - {_trace_kept(ctx, e)}")
        raise click.exceptions.Exit(int(ExitCode.ERROR)) from e


def _trace_kept(ctx: click.Context | None, error: Exception) -> str:
    """Put the trace where it can be found; what to do about it."""
    from xpeer_daemon import logs  # noqa: PLC0415 - rarely needed

    home: Home | None = ctx.meta.get(_HOME) if ctx is not None else None
    if home is not None and home.path.is_dir():
        with contextlib.suppress(ConfigError, OSError):
            secure(home, look_only=True)
            logs.add_fault(home.log, error)
            return f"please report it, with the end of {home.log}"
    handle, name = tempfile.mkstemp(prefix="xpeer-", suffix=".log")  # mode 0600
    os.close(handle)
    logs.add_fault(Path(name), error)
    return f"please report it, with {name}"


def _complain(message: str) -> None:
    say(f"xpeer: error: {one_line(hidden(message))}")


def _home(ctx: click.Context, param: click.Parameter, value: str) -> Home:
    source = ctx.get_parameter_source(param.name or "")
    if source is ParameterSource.DEFAULT:
        value = os.environ.get(HOME_VARIABLE, value)  # click takes an empty one for unset
    name = "--home" if source is ParameterSource.COMMANDLINE else HOME_VARIABLE
    home = Home(Path(checked_home(name, value)))
    if home.path.exists() and not home.path.is_dir():
        raise ConfigError(f"home {home.path} is not a folder", "name another with --home")
    ctx.meta[_HOME] = home
    return home
