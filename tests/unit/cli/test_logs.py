"""`xpeer logs` over real files, written as the daemon writes them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from xpeer.cli import main
from xpeer.cli.logs import _Tail
from xpeer.errors import ExitCode


def line(number: int, level: str = "info") -> str:
    return f"2026-01-01T00:00:{number:02d}.000Z {level} xpeer.node: line {number}"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "daemon.log"
    path.write_text(
        "\n".join(
            [
                line(3),
                line(4, "error"),
                "  Traceback (most recent call last):",
                "  ValueError: x",
                '{"time":"2026-01-01T00:00:05.000Z","level":"warning","logger":"xpeer.x",'
                '"message":"line 5"}',
                line(6, "debug"),
            ]
        )
        + "\n"
    )
    path.with_name("daemon.log.1").write_text(f"{line(1)}\n{line(2)}\n")
    return path


def xpeer(home: Path, *args: str) -> Result:
    return CliRunner().invoke(main, ["logs", "--home", str(home), *args])


def numbers(out: str) -> list[int]:
    return [int(x.rsplit(" ", 1)[1]) for x in out.splitlines() if " line " in x]


def test_what_a_peer_chose_does_not_steer_the_terminal(log: Path) -> None:
    entry = {"time": "2026-01-01T00:00:07.000Z", "level": "info", "logger": "xpeer.x"}
    hostile = {
        "message": "line \x1b[2J\n2026-01-01T00:00:08.000Z error x: forged",
        "trace": " a\n\x07",
    }
    with log.open("a") as file:
        file.write(json.dumps(entry | hostile) + "\n")
    out = xpeer(log.parent, "-n", "1").stdout
    assert len(out.splitlines()) == 3
    assert "line \\x1b[2J\\n2026" in out
    assert "\x1b" not in out
    assert "\x07" not in out
    told = json.loads(xpeer(log.parent, "-n", "1", "--json").stdout)
    assert told == entry | hostile


def test_both_formats_and_the_rotated_file(log: Path) -> None:
    result = xpeer(log.parent)
    assert result.exit_code == ExitCode.OK
    assert numbers(result.stdout) == [1, 2, 3, 4, 5, 6]
    assert "  ValueError: x" in result.stdout


def test_tail_counts_entries(log: Path) -> None:
    assert numbers(xpeer(log.parent, "--tail", "3").stdout) == [4, 5, 6]
    assert xpeer(log.parent, "--tail", "0").stdout == ""


def test_level_is_this_and_worse(log: Path) -> None:
    assert numbers(xpeer(log.parent, "--level", "warning").stdout) == [4, 5]
    assert numbers(xpeer(log.parent, "--level", "warning", "--tail", "1").stdout) == [5]


def test_json_lines(log: Path) -> None:
    entries = [json.loads(x) for x in xpeer(log.parent, "--json").stdout.splitlines()]
    assert [entry["message"] for entry in entries] == [f"line {n}" for n in range(1, 7)]
    assert "ValueError: x" in entries[3]["trace"]


def test_no_log_yet(tmp_path: Path) -> None:
    result = xpeer(tmp_path)
    assert result.exit_code == ExitCode.NOT_RUNNING
    assert result.stderr.startswith("xpeer: error: there is no log ")


def test_unreadable_log(tmp_path: Path) -> None:
    (tmp_path / "daemon.log").mkdir()
    result = xpeer(tmp_path)
    assert result.exit_code == ExitCode.BAD_CONFIG
    assert "journalctl" in result.stderr


def test_tail_survives_rotation_and_partial_lines(log: Path) -> None:
    with closing(_Tail(log)) as tail:
        assert len(tail.new_lines()) == 6
        with log.open("a") as file:
            file.write("half a li")
        assert tail.new_lines() == []
        with log.open("a") as file:
            file.write("ne\nlast of the old file\n")
        log.rename(log.with_name("daemon.log.1"))
        assert tail.new_lines() == ["half a line", "last of the old file"]
        log.write_text("first of the new file\n")
        assert tail.new_lines() == ["first of the new file"]


def test_follow(log: Path) -> None:
    command = [
        sys.executable, "-m", "xpeer.cli", "logs", "--home", str(log.parent), "-f", "-n", "1",
    ]  # fmt: skip
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
        # a background job of a script ignores it, and hands that down
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    ) as running:
        assert running.stdout is not None
        assert numbers(running.stdout.readline()) == [6]
        with log.open("a") as file:
            file.write(f"{line(7)}\n")
        assert numbers(running.stdout.readline()) == [7]
        running.send_signal(signal.SIGINT)
        assert running.wait(20) == 130
