"""The root command: its table, its error boundary, its small commands."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import cast

import click
import pytest
from click.testing import CliRunner

from xpeer import __version__, cli
from xpeer.cli.common import echo_json, error_boundary, home_option
from xpeer.config import Home
from xpeer.errors import ConfigError, ExitCode, LocalError, PeerError, Reason

ROOT = Path(__file__).parents[3]


def xpeer(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli.main, args)
    return result.exit_code, result.stdout, result.stderr


def test_help_lists_every_command() -> None:
    code, out, _ = xpeer("--help")
    assert code == ExitCode.OK
    for name, help_line in cli.all_commands().items():
        assert any(
            line.split() and line.split()[0] == name and help_line in line
            for line in out.splitlines()
        ), name


@pytest.mark.parametrize("name", cli.all_commands())
def test_every_command_exists_and_says_what_it_does(name: str) -> None:
    context = click.Context(cli.main)
    command = cast(click.Group, cli.main).get_command(context, name)
    assert command is not None
    assert command.name == name
    assert command.help
    assert cli.all_commands()[name] not in ("", "None")  # its short_help
    assert xpeer(name, "--help")[0] == ExitCode.OK


def test_usage_errors_are_two() -> None:
    code, out, err = xpeer("stauts")
    assert (code, out) == (ExitCode.USAGE, "")
    assert "stauts" in err
    assert xpeer("status", "--nonsense")[0] == ExitCode.USAGE


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ConfigError("a = 1 is wrong", "use 2"), 8, "xpeer: error: a = 1 is wrong - use 2\n"),
        (LocalError("two\nlines"), 1, "xpeer: error: two lines\n"),
        (PeerError(Reason.TIMEOUT, "30 s"), 1, "xpeer: error: timeout: 30 s\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_error_boundary(
    error: BaseException, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(click.exceptions.Exit) as caught, error_boundary():
        raise error
    assert caught.value.exit_code == code
    assert capsys.readouterr().err == line


def test_a_fault_of_ours_is_one_line_and_a_trace_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(click.exceptions.Exit) as caught, error_boundary():
        raise ZeroDivisionError("in\x1b[31m\ntwo")
    assert caught.value.exit_code == ExitCode.ERROR
    (kept,) = tmp_path.glob("xpeer-*.log")
    assert kept.stat().st_mode & 0o077 == 0
    assert capsys.readouterr().err == (
        "xpeer: error: a fault of xpeer: ZeroDivisionError: in\\x1b[31m two"
        f" - please report it, with {kept}\n"
    )
    assert "Traceback" in kept.read_text()


def test_home_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Path] = []

    @click.command()
    @home_option
    def command(home: Home) -> None:
        seen.append(home.path)

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XPEER_HOME", raising=False)
    CliRunner().invoke(command, [], catch_exceptions=False)
    CliRunner(env={"XPEER_HOME": str(tmp_path / "b")}).invoke(command, [])
    CliRunner(env={"XPEER_HOME": str(tmp_path / "b")}).invoke(
        command, ["--home", str(tmp_path / "c")]
    )
    assert seen == [tmp_path / ".xpeer", tmp_path / "b", tmp_path / "c"]


def test_echo_json(capsys: pytest.CaptureFixture[str]) -> None:
    echo_json({"a": [1, None]})
    assert json.loads(capsys.readouterr().out) == {"a": [1, None]}


def test_version() -> None:
    code, out, _ = xpeer("version", "--json")
    assert code == ExitCode.OK
    assert json.loads(out)["xpeer"] == __version__
    assert xpeer("version")[1].startswith(f"xpeer {__version__}\n")
    assert xpeer("--version")[1] == f"xpeer {__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    if shell == "bash" and shutil.which("bash") is None:
        pytest.skip("bash is not installed: click asks it for its version")
    code, out, _ = xpeer("completion", shell)
    assert code == ExitCode.OK
    assert "_XPEER_COMPLETE" in out
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=out, text=True, check=True)


def test_completion_imports_those_commands_alone_that_are_light(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    imported: list[str] = []
    real = importlib.import_module

    def noted(name: str) -> ModuleType:
        imported.append(name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", noted)
    ctx = click.Context(cli.main, info_name="xpeer")
    names = [item.value for item in cli.main.shell_complete(ctx, "st")]
    assert names == ["start", "status", "stop"]
    assert set(imported) == {"xpeer.cli.node"}  # test_imports: `xpeer status` is light
