"""A model's name on the hub, or a path that is not there, in every option and setting that takes a
folder of a model, of a tokenizer or of adapters.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import cast

import click
import msgspec
import pytest
from click.testing import CliRunner

from tests.cases.support import tokenizer_folder
from tests.unit.cli.test_bad_input import TEXT, founded, refused, token
from tests.unit.cli.test_paths import commands
from xpeer.cli import main
from xpeer.cli.common import GivenPath
from xpeer.config import PATHS, Data, Home
from xpeer.errors import ConfigError, ExitCode
from xpeer.manifest import Tokenizer
from xpeer.needs import Needs
from xpeer.training.tokenizer import load_tokenizer

HUB = ("org/name", "https://huggingface.co/org/name", "hf://org/name")
FOUND = {
    f"{' '.join(words)} {option.opts[0]}": (words, option)
    for words, command in commands(cast(click.Group, main), click.Context(main))
    for option in command.params
    if isinstance(option.type, GivenPath) and option.type.kind != "new"
}
HELD = {
    name: (words, option.opts[0])
    for name, (words, option) in FOUND.items()
    if cast(GivenPath, option.type).content
}
GIVEN = {**HELD, "init --tokenizer": (("init", "--swarm", "s"), "--tokenizer")}
"""Words of a command, and an option that takes a folder of which the hub may have one."""
SETTINGS = ("data.tokenizer", "data.base_model")


def test_they_are_all_there() -> None:
    assert set(GIVEN) == {
        *("init --model", "init --model-config", "init --base-model", "init --lora-from"),
        *("init --tokenizer", "start --base-model", "start --tokenizer", "demo --model"),
        *("estimate --model", "estimate --model-config", "estimate --lora-from"),
        *("generate --model", "generate --base-model", "generate --tokenizer"),
        *("eval --model", "eval --base-model", "eval --tokenizer"),
        *("data inspect --tokenizer", "privacy plan --tokenizer"),
    }
    names = re.compile("model|tokenizer|lora.from")
    assert {name for name in FOUND if names.search(name)} <= set(GIVEN)
    assert {name for name in PATHS if names.search(name)} == set(SETTINGS)


@pytest.mark.parametrize("value", HUB)
@pytest.mark.parametrize("name", GIVEN)
def test_an_option_with_a_name_of_the_hub(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words, option = GIVEN[name]
    result = CliRunner().invoke(main, [*words, option, value])
    what, file = ("file", " config.json") if option == "--model-config" else ("folder", "")
    line = f"`hf download org/name{file} --local-dir name`, then give that {what}: {option} name"
    refused(result, ExitCode.BAD_CONFIG, f"{option} {Path(value)}: there is no such {what}", line)


@pytest.mark.parametrize("value", ["./missing/folder", "/missing/folder"])
@pytest.mark.parametrize("name", [*FOUND, "init --tokenizer"])
def test_an_option_with_a_path_that_is_not_there(
    name: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "missing").mkdir()
    words, option = GIVEN.get(name) or (FOUND[name][0], FOUND[name][1].opts[0])
    result = CliRunner().invoke(main, [*words, option, value])
    message = f"{option} {Path(value)}: there is no such "
    refused(result, ExitCode.BAD_CONFIG, message, " - name " if name in HELD else " - ")
    assert "hf download" not in result.output
    assert "Errno" not in result.output


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.chdir(tmp_path)
    return founded(tmp_path / "home")


def inspect(home: Home, setting: str, value: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `xpeer data inspect` says of the setting, in a home without a manifest."""
    monkeypatch.setenv(f"XPEER_{setting.replace('.', '_')}".upper(), value)
    command = ["data", "inspect", *TEXT, "--home", str(home.path.with_name("new"))]
    result = CliRunner().invoke(main, command)
    refused(result, ExitCode.BAD_CONFIG)
    return result.stderr


def joining(home: Home, setting: str, value: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `xpeer init --join` says."""
    monkeypatch.setenv(f"XPEER_{setting.replace('.', '_')}".upper(), value)
    new = str(home.path.with_name("new"))
    invited = token(home, None)
    result = CliRunner().invoke(main, ["init", "--home", new, *TEXT, "--join", invited])
    refused(result, ExitCode.BAD_CONFIG)
    return result.stderr


def needed(home: Home, setting: str, value: str, _: pytest.MonkeyPatch) -> str:
    """What a start says that the node lacks."""
    needs = Needs(tokenizer="ab" * 32 if setting == "data.tokenizer" else "", base_model="ab" * 32)
    data = msgspec.convert({setting.removeprefix("data."): value}, Data)
    items = needs.unmet(data, home)
    return next(each for each in items if each.startswith(setting))


def loaded(_home: Home, setting: str, value: str, _: pytest.MonkeyPatch) -> str:
    """What the trainer says that loads the tokenizer."""
    named = (value, "") if setting == "data.tokenizer" else ("", value)
    with pytest.raises(ConfigError) as caught:
        load_tokenizer(Tokenizer("huggingface"), named[0], base_model=named[1])
    return str(caught.value)


Ask = Callable[[Home, str, str, pytest.MonkeyPatch], str]
CASES = [
    (setting, ask)
    for setting in SETTINGS
    for ask in (inspect, joining, needed, loaded)
    if (setting, ask) != ("data.tokenizer", joining)  # it comes later, and init says so
]


@pytest.mark.parametrize(("setting", "ask"), CASES)
def test_a_setting_with_a_name_of_the_hub(
    setting: str, ask: Ask, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = ask(home, setting, "org/name", monkeypatch)
    assert f"{setting} org/name: there is no such folder here" in said
    line = "`hf download org/name --local-dir name`, then give that folder: "
    assert f"{line}{setting} = name" in said


@pytest.mark.parametrize(("setting", "ask"), CASES)
def test_a_setting_with_a_path_that_is_not_there(
    setting: str, ask: Ask, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = ask(home, setting, "/missing/folder", monkeypatch)
    assert f"{setting} /missing/folder: there is no such folder - name " in said
    assert "hf download" not in said


def test_a_folder_without_adapters(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path / "f")
    command = ["estimate", "--preset", "tiny", "--precision", "float32"]
    result = CliRunner().invoke(main, [*command, "--lora-from", str(folder)])
    message = f"--lora-from {folder}: its adapter_config.json can't be read: No such file"
    refused(result, ExitCode.BAD_CONFIG, message, "name a folder of adapters")
    assert "Errno" not in result.output
