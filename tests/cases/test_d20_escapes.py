"""D20: names of files, of peers, and errors of libraries never steer a terminal."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.cases.support import xpeer

EVIL = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e"


def clean(text: str) -> None:
    bad = {c for c in text if not c.isprintable() and c not in "\n\t"}
    assert not bad, repr(text)


def test_a_file_name_in_an_error_line(tmp_path: Path) -> None:
    (tmp_path / f"a{EVIL}.jsonl").write_text("not json\n")
    done = xpeer("privacy", "plan", "--steps", "9", "--shard", tmp_path / f"a{EVIL}.jsonl")
    clean(done.stderr)
    assert (done.returncode, "\\x1b[2J" in done.stderr) == (8, True), done.stderr


def run(*arguments: str | Path) -> Result:
    from xpeer.cli import main

    return CliRunner().invoke(main, list(map(str, arguments)))


def test_every_path_option(tmp_path: Path) -> None:
    """Of a file that is not there, or is of the wrong kind."""
    from tests.cases.test_d01_empty_path import path_options

    evil = tmp_path / f"x{EVIL}"
    evil.mkdir()
    for name, option in path_options():
        if name == ("demo",):
            continue
        for value in (str(evil / "none"), str(evil)):
            done = run(*name, option, value)
            clean(done.output)


@pytest.mark.parametrize("arguments", [(EVIL,), ("start", f"--{EVIL}"), ("start", f"x{EVIL}"),
                                       (f"--{EVIL}",), ("status", "--interval", EVIL),
                                       ("invite", "create", "--role", EVIL),
                                       ("init", "--swarm", EVIL), ("start", "--join", EVIL),
                                       ("init", "--swarm", "s", "--set", EVIL),
                                       ("start", "--listen", EVIL)])  # fmt: skip
def test_words_of_the_command_line(
    tmp_path: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XPEER_HOME", str(tmp_path / "h"))
    done = run(*arguments)
    assert done.exit_code != 0
    clean(done.output)


def test_what_is_printed_as_json() -> None:
    from xpeer.escape import json_text

    value: Any = {"a": [EVIL, "ü\U000e0001"], f"k{EVIL}": 1}
    clean(json_text(value))
    clean(json_text(value, indent=2))
    assert json.loads(json_text(value, indent=2)) == value
    assert json.loads(json_text({"p": "\udcff"})) == {"p": "\\udcff"}


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    home = os.fsencode(tmp_path) + b"/h\xff"
    done = run("id", "--home", os.fsdecode(home))
    assert (done.exit_code, "not UTF-8" in done.stderr) == (8, True)
    clean(done.output)
    text = tmp_path / "t"
    text.mkdir()
    (text / os.fsdecode(b"\xff\x1b.jsonl")).write_bytes(b"{")
    done = run("privacy", "plan", "--steps", "9", "--shard", text)
    assert done.exit_code == 8
    clean(done.output)


def test_lists_of_checkpoints(tmp_path: Path) -> None:
    home = tmp_path / f"h{EVIL}"
    (home / "checkpoints").mkdir(parents=True, mode=0o700)
    (home / "checkpoints" / "ckpt-000000003.safetensors").write_bytes(b"x")
    for command in (("list",), ("list", "--json"), ("verify",), ("verify", "--json")):
        done = run("checkpoint", *command, "--home", home)
        assert done.output.strip()
        clean(done.output)


def test_what_the_log_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import logging

    from xpeer.config import Home
    from xpeer_daemon import logs

    level = logging.getLogger().level
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # pytest's can't take all of it
    try:
        for kind in ("text", "json"):
            logs.setup(Home(tmp_path), "info", "json" if kind == "json" else "text")
            try:
                raise ValueError(f"a{EVIL}\nb\udcff")
            except ValueError:
                logging.getLogger("xpeer.test").exception("%s \udcff", EVIL)
    finally:
        logs.close()
        logging.getLogger().setLevel(level)
        logging.getLogger("xpeer").setLevel(logging.NOTSET)
        logging.captureWarnings(False)
    clean((tmp_path / "daemon.log").read_text())
    err = capsys.readouterr().err
    clean(err)
    assert err.count("ValueError") >= 2


def test_errors_that_cross_from_the_trainer() -> None:
    from xpeer.errors import ConfigError
    from xpeer.trainer.answers import failure_of

    for error in (ConfigError(f"file {EVIL}\udcff", EVIL), ValueError(f"x{EVIL}")):
        failure = failure_of(error)
        clean(failure.problem + failure.remedy + failure.trace)


def test_what_a_model_writes(capsys: pytest.CaptureFixture[str]) -> None:
    from xpeer.cli.common import echo_text

    echo_text(f"one\ttwo{EVIL}\nthree")
    out = capsys.readouterr().out
    clean(out)
    assert out.startswith("one\ttwo\\x1b")
    assert out.endswith("\nthree\n")
