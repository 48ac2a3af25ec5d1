"""What every command shares: where the node lives, how it answers, how it fails.

stdout is data, stderr is for people. A command raises `LocalError` or `PeerError` and the root
group turns it into one line and the documented exit code; nothing here imports torch or hivemind.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from xpeer import config_sources
from xpeer.config import DEFAULT_HOME, Home, NodeConfig
from xpeer.errors import ConfigError, ExitCode, LocalError, PeerError
from xpeer.escape import hidden, json_text, one_line, visible
from xpeer.files import secure
from xpeer.folders import Content, missing
from xpeer.paths import (
    Kind,
    checked,
    checked_home,
    checked_list,
    checked_text,
    refuse_impossible,
    require,
    status_of,
)
from xpeer.shortage import in_words, out_of_memory

HOME_VARIABLE = "XPEER_HOME"
_HOME = "xpeer.home"
"""Key under which a command's context keeps its home; parent contexts share it."""
INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""


class Ended(KeyboardInterrupt):
    """A signal that ends this command as Ctrl-C does."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.exit_code = 128 + number


class GivenPath(click.Path):
    """A path option. It refuses paths that are empty, missing, of another kind, or can't be used.

    Args:
        kind: what is expected. Only a new folder may be missing.
        content: what it holds, for the error if it is missing.
    """

    def __init__(self, kind: Kind, content: Content = "") -> None:
        super().__init__(path_type=Path)
        self.kind = kind
        self.content = content

    def convert(
        self,
        value: Any,
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> Any:
        """The path as `Path`, with `~` expanded."""
        name = _name_of(param)
        path = Path(checked(name, os.fspath(value))).expanduser()
        if status_of(name, path) is None and self.kind != "new":
            raise missing(path, name, self.content)
        if self.content == "model":
            from xpeer.source import refuse_file  # noqa: PLC0415 - only some commands need it

            refuse_file(path, name)
        require(name, path, self.kind)
        return path


class GivenText(click.ParamType[str]):
    """A file, folder or glob of text to train on, as `str`.

    Args:
        check: refuses bad values; called with the option's name and the value.
    """

    name = "path"

    def __init__(self, check: Callable[[str, str], str] = checked_text) -> None:
        self._check = check

    def convert(self, value: Any, param: click.Parameter | None, _ctx: click.Context | None) -> str:
        """The value, checked and unchanged."""
        name = _name_of(param)
        text = self._check(name, str(value))
        refuse_impossible(name, text)
        return text


class GivenName(click.ParamType[str]):
    """An option with a name, e.g. of a field, which may not be blank."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, _ctx: click.Context | None) -> str:
        """The value, checked and unchanged."""
        return checked_list(_name_of(param), str(value))


class Number(click.FloatRange):
    """An option with a finite number in bounds. Any other is a ConfigError: exit code 8."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """As click does, but refuse NaN and infinity, too."""
        with _bad_values(param):
            number = float(super().convert(value, param, ctx))
            if not math.isfinite(number):
                self.fail(f"{value} is no finite number.", param, ctx)
        return number


class Whole(click.IntRange):
    """An option with a whole number in bounds. Any other is a ConfigError: exit code 8."""

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
        default=str(DEFAULT_HOME),
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
        path: a file that was named on the command line.

    Raises:
        ConfigError: names the key, the value and a remedy.
    """
    return config_sources.load(path or home.config, os.environ, overrides)


def echo_json(value: Any) -> None:
    """Print a msgspec struct, dict or list as indented JSON on stdout."""
    click.echo(json_text(value, indent=2))


def echo(line: str) -> None:
    """Print a line of the answer on stdout."""
    click.echo(visible(line))


def echo_text(text: str) -> None:
    """Print text of several lines on stdout, e.g. the words of a model."""
    click.echo("\n".join("\t".join(map(visible, x.split("\t"))) for x in text.split("\n")))


def say(line: str) -> None:
    """Print a line for people on stderr."""
    click.echo(visible(line), err=True)


def say_foreign() -> None:
    """Say which variables with our prefix were ignored, because they belong to another program."""
    if note := config_sources.note_of_foreign(os.environ):
        say(f"note: {note}")


def secure_home(home: Home) -> None:
    """Close a home to other users before anything is written to it, and say what was closed.

    Raises:
        ConfigError: other users may write to it.
    """
    for note in secure(home):
        say(f"note: {note}")


@contextmanager
def error_boundary(ctx: click.Context | None = None) -> Iterator[None]:
    """Turn a command's error into one line on stderr and an exit code.

    An error that was not raised on purpose is a fault of ours, unless memory ran out. Its trace
    goes to the home's log, or to a new file if the command has no home yet.

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
        code = e.exit_code if isinstance(e, Ended) else INTERRUPTED
        raise click.exceptions.Exit(code) from e
    except Exception as e:
        if isinstance(e, OSError) and e.errno == errno.EPIPE:
            raise  # nobody reads our output any more: click ends without a message
        where = _trace_kept(ctx, e)
        if out_of_memory(e):
            _complain(f"{in_words(e)}; its trace: {where}")
        else:
            _complain(f"a fault of xpeer: {type(e).__name__}: {e} - please report it, with {where}")
        raise click.exceptions.Exit(int(ExitCode.ERROR)) from e


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does, so that its temporary files go.

    If `nohup` set SIGHUP to be ignored, it stays ignored.
    """
    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if threading.current_thread() is threading.main_thread()
        and signal.getsignal(number) is not signal.SIG_IGN
    ]

    def end(number: int, _frame: object) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)  # a second one does not stop the cleaning
        raise Ended(number)

    before = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _trace_kept(ctx: click.Context | None, error: Exception) -> str:
    """Write the trace to a log; returns where it is, in words."""
    from xpeer_daemon import logs  # noqa: PLC0415 - rarely needed

    home: Home | None = ctx.meta.get(_HOME) if ctx is not None else None
    if home is not None and home.path.is_dir():
        with contextlib.suppress(ConfigError, OSError):
            secure(home, look_only=True)
            logs.add_fault(home.log, error)
            return f"the end of {home.log}"
    handle, name = tempfile.mkstemp(prefix="xpeer-", suffix=".log")  # mode 0600
    os.close(handle)
    logs.add_fault(Path(name), error)
    return name


def _complain(message: str) -> None:
    say(f"xpeer: error: {one_line(hidden(message))}")


def _home(ctx: click.Context, param: click.Parameter, value: str) -> Home:
    source = ctx.get_parameter_source(param.name or "")
    if source is ParameterSource.DEFAULT:
        value = os.environ.get(HOME_VARIABLE, value)  # click treats an empty one as unset
    name = "--home" if source is ParameterSource.COMMANDLINE else HOME_VARIABLE
    home = Home(checked_home(name, value))
    ctx.meta[_HOME] = home
    return home
