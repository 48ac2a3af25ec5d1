"""D25: a warning of the trainer process is a warning in the daemon's log."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from tests.unit.training.homes import make_homes
from xpeer.trainer.channel import log_lines
from xpeer.trainer.client import TrainerProcess
from xpeer.training.reading import Recipe
from xpeer.training.tokenizer import ByteTokenizer


async def test_a_warning_of_the_trainer_process_stays_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    setup = make_homes(tmp_path, 1)[0]
    tokens = Path(setup.home) / "cache" / "tokens" / Recipe(ByteTokenizer()).digest
    tokens.mkdir(parents=True)
    (tokens / "damaged.tokens").write_text("cut off")
    with caplog.at_level(logging.INFO, "xpeer"):
        trainer = await TrainerProcess.start(setup, lambda event: None)
        await trainer.stop(60)
    said = {r.levelname for r in caplog.records if "tokens are made again" in r.getMessage()}
    assert said == {"WARNING"}


async def passed_on(output: bytes, caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    reader = asyncio.StreamReader()
    reader.feed_data(output)
    reader.feed_eof()
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "xpeer.test"):
        await log_lines(reader, logging.getLogger("xpeer.test"))
    return [(record.levelname.lower(), record.getMessage()) for record in caplog.records]


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error", "critical"])
async def test_every_level_is_kept(level: str, caplog: pytest.LogCaptureFixture) -> None:
    from xpeer.trainer.channel import LevelFormatter

    record = logging.LogRecord(
        "xpeer.x", logging.getLevelNamesMapping()[level.upper()], "", 0, "a %s\n<10>b", ("x",), None
    )
    line = LevelFormatter("%(message)s").format(record) + "\n"
    assert await passed_on(line.encode(), caplog) == [(level, "a x"), (level, "<10>b")]


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (b"library.py:3: UserWarning: old\n", [("warning", "library.py:3: UserWarning: old")]),
        (
            b'<20>fine\nFatal Python error: Segmentation fault\n  File "x.py"\n<20>on\nlast',
            [
                ("info", "fine"),
                ("error", "Fatal Python error: Segmentation fault"),
                ("error", '  File "x.py"'),
                ("info", "on"),
                ("warning", "last"),
            ],
        ),
        (
            b"Traceback (most recent call last):\n  x\nValueError: y\n",
            [
                ("error", "Traceback (most recent call last):"),
                ("error", "  x"),
                ("error", "ValueError: y"),
            ],
        ),
        (
            b"Exception in thread disk:\nz\n",
            [("error", "Exception in thread disk:"), ("error", "z")],
        ),
    ],
)
async def test_what_no_logger_wrote(
    output: bytes, expected: list[tuple[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    assert await passed_on(output, caplog) == expected
