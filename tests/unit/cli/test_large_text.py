"""Commands that make tokens of a large text say how far they are, and leave no tokens behind."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tests.unit.test_trial import init
from xpeer.cli import main
from xpeer.cli.common import INTERRUPTED
from xpeer.errors import ExitCode
from xpeer.status import TextProgress
from xpeer.training import tokenising
from xpeer.training.tokenising import tokenise

COMMANDS = {
    "inspect": ["data", "inspect"],
    "plan": ["privacy", "plan", "--steps", "20", "--batch", "8"],
    "dry run": ["start", "--dry-run", "--skip-trial"],
}


@pytest.fixture(params=COMMANDS)
def run(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Result]:
    shard = tmp_path / "shard"
    shard.mkdir()
    for number in range(20):
        (shard / f"{number}.txt").write_text(f"letter {number} of a large shard " * 20)
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    home = tmp_path / "home"
    words = [*COMMANDS[request.param], "--shard", str(shard)]
    if request.param == "dry run":
        code, said = init(home, "--preset", "tiny", "--skip-trial", "--skip-estimate")
        assert code == ExitCode.OK, said
    return lambda: CliRunner(env={"XPEER_HOME": str(home)}).invoke(main, words)


def left(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "temporary").iterdir())


def test_they_say_how_far_they_are(
    tmp_path: Path, run: Callable[[], Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("_REPORT_EVERY_S", 0.0), ("TOLD_EVERY_S", 0.0), ("BATCH_EVENTS", 8)):
        monkeypatch.setattr(tokenising, name, value)
    done = run()
    assert done.exit_code == ExitCode.OK, done.stderr
    assert "(100%) are tokenised" in done.stderr
    assert "are tokenised" not in done.stdout
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, INTERRUPTED)],
    ids=["TERM", "HUP", "INT"],
)
def test_a_signal_leaves_no_tokens(
    tmp_path: Path,
    run: Callable[[], Result],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    code: int,
) -> None:
    seen = []

    def interrupted(*args: Any) -> Any:
        known = tokenise(*args)
        seen.extend(left(tmp_path))
        os.kill(os.getpid(), number)
        return known

    monkeypatch.setattr("xpeer.trainer.text.tokenise", interrupted)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)
    # without a handler the signal would end the tests, not one of them
    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, lambda *_: None)
    try:
        done = run()
    finally:
        for each, handler in zip((signal.SIGTERM, signal.SIGHUP), before, strict=True):
            signal.signal(each, handler)
    assert [name[:13] for name in seen] == ["xpeer-tokens-"]
    assert done.exit_code == code
    assert left(tmp_path) == []


def test_a_line_comes_every_ten_seconds() -> None:
    now = 0.0
    lines: list[str] = []
    tell = tokenising.told(lines.append, lambda: now)
    for half_seconds in range(70):
        now = half_seconds / 2
        tell(TextProgress(bytes_read=half_seconds, bytes_total=70))
    assert len(lines) == 3
    assert "(29%) are tokenised" in lines[0]
