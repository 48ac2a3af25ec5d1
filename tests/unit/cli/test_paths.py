"""Paths that lead nowhere, given to every option and setting that takes one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import click
import pytest
from click.testing import CliRunner, Result

from tests.unit.cli.test_bad_input import TEXT, founded, refused
from xpeer.cli import main
from xpeer.cli.common import GivenPath, GivenText
from xpeer.config import PATHS, Home
from xpeer.errors import ExitCode

with tempfile.NamedTemporaryFile() as _closed:
    os.chmod(_closed.name, 0)  # noqa: PTH101 - a name
    AS_ROOT = os.access(_closed.name, os.R_OK)
    """Whether this user may read everything, as root mostly may."""
NO_FOLDER = ("data.shard", "data.corpus")
"""Settings that a file may be the value of, too."""


def commands(
    group: click.Group, context: click.Context, *above: str
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield (*above, name), command
        if isinstance(command, click.Group):
            yield from commands(command, context, *above, name)


def takes_a_path(option: click.Parameter) -> bool:
    if option.name in ("home", "join"):
        return True
    return isinstance(option.type, GivenPath | GivenText) and option.name != "text_field"


OPTIONS = [
    pytest.param(words, option, id=" ".join([*words, option.opts[0]]))
    for words, command in commands(cast(click.Group, main), click.Context(main))
    for option in command.params
    if takes_a_path(option)
]
BAD = ("loop", "through a loop", "nul", "long name", "long path", "inside a file")


def bad(how: str, folder: Path) -> str:
    """A path that can't lead anywhere."""
    (folder / "file").write_text("x")
    (folder / "loop").symlink_to(folder / "loop")
    return {
        "loop": f"{folder}/loop",
        "through a loop": f"{folder}/loop/inside",
        "nul": f"{folder}/a\0b",
        "long name": f"{folder}/{'x' * 300}",
        "long path": str(folder) + "/x" * 3000,
        "inside a file": f"{folder}/file/inside",
    }[how]


def given(words: tuple[str, ...], option: click.Parameter, value: str) -> Result:
    value = f"file:{value}" if option.name == "join" else value
    return CliRunner().invoke(main, [*words, option.opts[0], value])


def test_there_are_options_with_paths() -> None:
    """Else the tests below would test nothing."""
    names = {each.id for each in OPTIONS}
    assert {"status --home", "init --model", "privacy plan --shard", "start --join"} <= names
    assert len(names) > 50


@pytest.mark.parametrize("how", BAD)
@pytest.mark.parametrize(("words", "option"), OPTIONS)
def test_options(words: tuple[str, ...], option: click.Parameter, how: str, tmp_path: Path) -> None:
    value = bad(how, tmp_path)
    shown = str(tmp_path) if how != "nul" else "NUL"
    refused(given(words, option, value), ExitCode.BAD_CONFIG, f"{option.opts[0]}", shown)


@pytest.mark.parametrize(("words", "option"), OPTIONS)
def test_a_file_for_a_folder_and_the_other_way_round(
    words: tuple[str, ...], option: click.Parameter, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    kind = getattr(option.type, "kind", "text")
    other = {"home": "file", "join": ""}.get(str(option.name))
    if other is None:
        other = {"file": "", "text": None}.get(kind, "file")
    if other is None:
        return  # text may be either
    result = given(words, option, str(tmp_path / other))
    refused(result, ExitCode.BAD_CONFIG, option.opts[0], str(tmp_path))


@pytest.mark.parametrize(
    ("words", "option"),
    [each for each in OPTIONS if getattr(each.values[1], "name", "") == "home"],
)
@pytest.mark.parametrize("how", [*BAD, "file", "link to nothing"])
def test_the_home_in_the_environment(
    words: tuple[str, ...],
    option: click.Parameter,
    how: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "broken").symlink_to(tmp_path / "nothing")
    if how == "nul":
        pytest.skip("a variable holds none")
    others = {"file": "file", "link to nothing": "broken"}
    value = bad(how, tmp_path) if how in BAD else str(tmp_path / others[how])
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("XPEER_HOME", value)
    result = CliRunner().invoke(main, list(words))
    refused(result, ExitCode.BAD_CONFIG, "XPEER_HOME", str(tmp_path))


@pytest.mark.skipif(AS_ROOT, reason="root may read and write everything")
@pytest.mark.parametrize("where", ["closed", "closed/inside"])
@pytest.mark.parametrize(("words", "option"), OPTIONS)
def test_no_permission(
    words: tuple[str, ...], option: click.Parameter, where: str, tmp_path: Path
) -> None:
    if isinstance(option.type, GivenText):
        pytest.skip("the command that reads the text says so")
    closed = tmp_path / "closed"
    if getattr(option.type, "kind", "") == "file" and where == "closed":
        closed.write_text("x")
    else:
        closed.mkdir()
    closed.chmod(0)
    try:
        result = given(words, option, str(tmp_path / where))
    finally:
        closed.chmod(0o700)
    refused(result, ExitCode.BAD_CONFIG, option.opts[0], str(closed))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return founded(tmp_path_factory.mktemp("paths") / "home")


def started(home: Home, setting: str, *options: str) -> Result:
    text = () if setting in NO_FOLDER else TEXT
    return CliRunner().invoke(
        main, ["start", "--dry-run", "--skip-trial", "--home", str(home.path), *text, *options]
    )


KINDS = [*BAD, "file", "closed"]


def wrong(how: str, setting: str, folder: Path) -> str:
    if how == "file" and setting == "daemon.socket":
        return str(folder)
    if how == "closed":
        (folder / "closed").mkdir(mode=0)
        return f"{folder}/closed/inside"
    value = bad("loop" if how == "file" else how, folder)
    return f"{folder}/file" if how == "file" else value


def left_out(how: str, setting: str) -> bool:
    return (how == "file" and setting in NO_FOLDER) or (how == "closed" and AS_ROOT)


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("setting", sorted(PATHS))
def test_settings_in_the_file(
    setting: str, how: str, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if left_out(how, setting):
        pytest.skip("nothing is wrong with that")
    value = wrong(how, setting, tmp_path).replace("\0", "\\u0000")
    monkeypatch.delenv("XPEER_PRIVACY_REGISTER", raising=False)  # as conftest has set it
    section, key = setting.split(".")
    written = f'["{value}"]' if setting in NO_FOLDER else f'"{value}"'
    (tmp_path / "config.toml").write_text(f"[{section}]\n{key} = {written}\n")
    result = started(home, setting, "--config", str(tmp_path / "config.toml"))
    refused(result, ExitCode.BAD_CONFIG, setting, str(tmp_path) if how != "nul" else "NUL")


@pytest.mark.parametrize("how", [each for each in KINDS if each != "nul"])
@pytest.mark.parametrize("setting", sorted(PATHS))
def test_settings_in_the_environment(
    setting: str, how: str, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if left_out(how, setting):
        pytest.skip("nothing is wrong with that")
    variable = f"XPEER_{setting.replace('.', '_')}".upper()
    monkeypatch.setenv(variable, wrong(how, setting, tmp_path))
    result = started(home, setting)
    refused(result, ExitCode.BAD_CONFIG, str(tmp_path))
    assert variable in result.stderr or setting in result.stderr


def test_a_list_of_long_paths_in_the_environment(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole list is no path, so it may be longer than one."""
    many = [tmp_path / f"{n:0200}" for n in range(40)]
    for folder in many:
        folder.mkdir()
        (folder / "a.txt").write_text(f"hello, world {folder.name}")
    monkeypatch.setenv("XPEER_DATA_SHARD", ",".join(map(str, many)))
    result = started(home, "data.shard")
    assert result.exit_code == ExitCode.OK, result.stderr


@pytest.mark.parametrize("how", ["loop", "through a loop", "inside a file"])
def test_a_command_says_that_the_socket_of_a_setting_can_not_be_there(
    how: str, home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XPEER_DAEMON_SOCKET", bad(how, tmp_path))
    result = CliRunner().invoke(main, ["status", "--home", str(home.path)])
    refused(result, ExitCode.BAD_CONFIG, "daemon.socket", str(tmp_path))
