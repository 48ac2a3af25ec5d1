"""D01: an unset variable is an empty path, and an empty path would be the current folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from tests.cases.support import LOOPBACK, xpeer


def test_the_current_folder_never_becomes_the_shard(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nobody is to train on this\n")
    done = xpeer(
        "init", "--swarm", "s", "--home", "h", "--preset", "tiny", "--set", "end.steps=20",
        "--listen", LOOPBACK, "--shard", "", cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, "--shard is empty" in done.stderr) == (8, True), done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt"]


# What takes a path, found by looking


def commands(group: click.Group, *above: str) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    ctx = click.Context(group)
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        if isinstance(command, click.Group):
            yield from commands(command, *above, name)
        elif command is not None:
            yield (*above, name), command


def path_options() -> list[tuple[tuple[str, ...], str]]:
    from xpeer.cli import main
    from xpeer.cli.common import GivenPath, GivenText

    found: list[tuple[tuple[str, ...], str]] = []
    for name, command in commands(main):
        for option in command.params:
            assert not isinstance(option.type, click.Path | click.File) or isinstance(
                option.type, GivenPath
            ), f"{name} {option.name}: use GivenPath, which refuses an empty path"
            if isinstance(option.type, GivenPath | GivenText) or option.name == "home":
                found.append((name, option.opts[0]))
    return found


def test_every_path_option_is_found() -> None:
    """By what help texts say of paths."""
    known = {(name, option) for name, option in path_options()}
    from xpeer.cli import main

    for name, command in commands(main):
        for option in command.params:
            if option.name in ("home", "shard", "corpus", "tokenizer", "model", "base_model",
                               "model_config", "public_text", "config_path", "folder", "path",
                               "out"):  # fmt: skip
                assert (name, option.opts[0]) in known, (name, option.name)
    assert len(known) > 30


def refused(done: Result, *words: str) -> None:
    assert done.exit_code == 8, (done.output, done.exception)
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where an empty path would lead."""
    (tmp_path / "notes.txt").write_text("private")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("blank", ["", " \t"])
def test_no_command_takes_a_blank_path(here: Path, blank: str) -> None:
    from xpeer.cli import main

    for name, option in path_options():
        done = CliRunner().invoke(main, [*name, option, blank])
        refused(done, f"{option} is empty")
    assert [p.name for p in here.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "shape", ["/", "//", "/.", "/..", "/*", "/**/*.txt", "/./", "/?", "/[a-z]"]
)
def test_everything_on_the_machine_is_no_shard(here: Path, shape: str) -> None:
    from xpeer.cli import main

    for name, option in path_options():
        if option in ("--shard", "--corpus"):
            refused(CliRunner().invoke(main, [*name, option, shape]), option, "everything")
    (here / "h").mkdir(mode=0o700)
    for text in (f'shard = ["{shape}"]', f'corpus = ["{shape}"]'):
        (here / "h" / "config.toml").write_text(f"[data]\n{text}\n")
        refused(CliRunner().invoke(main, ["status", "--home", "h"]), "everything")


def test_the_root_is_no_home(here: Path) -> None:
    from xpeer.cli import main

    for name in ("init", "start", "id", "status"):
        refused(CliRunner().invoke(main, [name, "--home", "/"]), "--home", "root of the file")


def test_an_absolute_folder_and_a_glob_are_taken(tmp_path: Path) -> None:
    from xpeer.paths import checked_text

    for good in ("/data", "/data*/text", "data", ".", "*.txt", "~/text", str(tmp_path)):
        assert checked_text("--shard", good) == good


@pytest.mark.parametrize(
    "body", ['shard = [""]', 'shard = ["/data", " "]', 'corpus = [""]', 'tokenizer = " "',
             'base_model = "\\t"', 'shard = ["~nobody-of-that-name/text"]'],
)  # fmt: skip
def test_blank_settings(here: Path, body: str) -> None:
    from xpeer.cli import main

    (here / "h").mkdir(mode=0o700)
    (here / "h" / "config.toml").write_text(f"[data]\n{body}\n")
    refused(CliRunner().invoke(main, ["start", "--home", "h"]), f"data.{body.partition(' ')[0]}")


def test_blank_variables_of_every_path_setting(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from xpeer import config
    from xpeer.cli import main

    monkeypatch.delenv("XPEER_PRIVACY_REGISTER")
    assert {"data.shard", "data.corpus", "data.tokenizer", "privacy.register"} <= config.PATHS
    for setting in config.PATHS:
        name = f"XPEER_{setting.replace('.', '_').upper()}"
        lists = isinstance(next(d for s, k, d in config.settings() if f"{s}.{k}" == setting), list)
        for raw in ("", "  ", *(("/a,,/b", "/a,", ",", " , ") if lists else ())):
            refused(CliRunner(env={name: raw}).invoke(main, ["status", "--home", "h"]), name)


def test_every_setting_that_may_be_a_path_is_one_or_is_none() -> None:
    """A new setting in words has to be looked at."""
    from xpeer import config

    words = {
        f"{section}.{key}"
        for section, key, default in config.settings()
        if isinstance(default, str | list)
    }
    no_paths = {
        "network.listen", "network.announce", "network.bootstrap", "network.direct_listen",
        "network.zone", "network.currency", "network.name", "data.text_field", "data.split",
        "data.privacy", "training.device", "training.precision", "training.compile",
        "training.checkpoint_activations", "training.pack", "training.check_fit",
        "privacy.generator",
        "daemon.log_level", "daemon.log_format",
    }  # fmt: skip
    assert words - no_paths <= config.PATHS, "mark a path as `Place`, or list it above"


def test_a_comma_in_a_path(here: Path) -> None:
    from xpeer.cli import main

    (here / "a,b").mkdir()
    (here / "b").mkdir()
    env = {"XPEER_DATA_SHARD": f"{here}/a,b"}
    refused(CliRunner(env=env).invoke(main, ["status", "--home", "h"]), "comma", "a,b exists")


def test_home_from_an_empty_variable(here: Path) -> None:
    from xpeer.cli import main

    for blank in ("", " "):
        done = CliRunner(env={"XPEER_HOME": blank, "HOME": str(here)}).invoke(main, ["id"])
        refused(done, "XPEER_HOME is empty")
    done = CliRunner(env={"XPEER_HOME": ""}).invoke(main, ["id", "--home", "h"])
    assert done.exit_code == 0
    refused(CliRunner(env={"HOME": ""}).invoke(main, ["id"]), "HOME is empty")


def test_other_blank_words(here: Path) -> None:
    from xpeer.cli import main

    for arguments in (
        ("start", "--join", "file:"), ("init", "--join", "file: "),
        ("bootstrap", "--join", "file:"),
        ("start", "--listen", ""), ("start", "--announce", ""), ("start", "--bootstrap", ""),
        ("bootstrap", "--swarm", "0" * 64, "--bootstrap", ""),
    ):  # fmt: skip
        refused(CliRunner().invoke(main, [*arguments, "--home", "h"]))


# Our own files are no text


@pytest.fixture
def home(tmp_path: Path) -> Path:
    from xpeer.cli import main

    made = tmp_path / "h"
    assert CliRunner().invoke(main, ["id", "--home", str(made)]).exit_code == 0
    (made / "initial").mkdir()
    (made / "initial" / "README.md").write_text("a model's card\n")
    (made / "config.toml").write_text("")
    return made


@pytest.mark.parametrize("what", [".", "h", "h/*", "h/config.toml", "h/initial", "h/initial/*.md"])
def test_a_home_is_no_shard(home: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from xpeer.cli import main

    monkeypatch.chdir(home.parent)
    done = CliRunner().invoke(main, ["privacy", "plan", "--steps", "9", "--shard", what])
    refused(done, "--shard", "belongs to the xpeer folder")


def test_text_in_a_folder_of_a_home_is_text(home: Path) -> None:
    from tests.in_memory import load_documents

    text = home / "text"
    text.mkdir(exist_ok=True)
    (text / "a.txt").write_text("mine")
    assert len(load_documents([str(text)])) == 1
