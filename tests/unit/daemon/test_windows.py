"""losses.csv and the log's line at the end of every window."""

from __future__ import annotations

import csv
import logging
import os
import stat
from pathlib import Path

import pytest

from tests.unit.daemon.fakes import ALPHA, FakeNode
from xpeer.errors import ConfigError
from xpeer.status import PrivacySpent, Progress
from xpeer_daemon import windows
from xpeer_daemon.store import Known, Store
from xpeer_daemon.windows import Windows


@pytest.fixture
def fake() -> FakeNode:
    return FakeNode(ALPHA)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "losses.csv"


def says(fake: FakeNode, step: int, mode: str = "record") -> None:
    """The trainer has ended a window of ten steps."""
    fake.clock.now += 10
    progress = Progress(
        step=step, window=step // 10, planned_steps=2000, loss_public=2.41, loss_train=2.5,
        tokens_per_s=1100.0,
    )  # fmt: skip
    spent = PrivacySpent(mode=mode, epsilon_spent=3.2, epsilon_target=8.0)
    fake.node.follow_trainer("training", progress, spent)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_and_a_line_a_window(
    fake: FakeNode, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    kept: list[Known] = []
    writer = Windows(path, fake.node, kept.append)
    for step in (320, 330, 335, 340):
        says(fake, step)
        writer.poll()
    assert [(row["step"], row["window"]) for row in rows(path)] == [("330", "33"), ("340", "34")]
    row = rows(path)[-1]
    assert tuple(row) == windows.COLUMNS
    assert (row["schema"], row["loss_public"], row["loss_train"]) == ("1", "2.41", "2.5")
    assert (row["loss_validation"], row["epsilon"], row["bytes_out"]) == ("", "3.2", "20")
    assert float(row["unix_s"]) == fake.clock()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    lines = [r.getMessage() for r in caplog.records if r.name == "xpeer.windows"]
    assert len(lines) == 2
    assert lines[-1].startswith(
        "step 340/2000, public loss 2.4100, epsilon 3.200 of 8, 0 exchanges, 1,100 tokens/s, ETA "
    )
    assert "2.5" not in lines[-1]  # a loss on private text
    assert [known.progress.step for known in kept] == [330, 340]


def test_without_privacy_nothing_is_said_of_it(
    fake: FakeNode, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    writer = Windows(path, fake.node, lambda _: None)
    for step in (10, 20):
        says(fake, step, "off")
        writer.poll()
    assert "epsilon" not in caplog.text
    assert rows(path)[0]["epsilon"] == ""


def test_rows_go_on_after_restarts_and_crashes(fake: FakeNode, path: Path) -> None:
    for steps in ((10, 20), (20, 30), (10, 20)):  # the last one from an older checkpoint
        writer = Windows(path, fake.node, lambda _: None)
        for step in steps:
            says(fake, step)
            writer.poll()
    assert [row["step"] for row in rows(path)] == ["20", "30", "20"]


def test_a_trainer_that_went_back_is_followed_from_there(fake: FakeNode, path: Path) -> None:
    writer = Windows(path, fake.node, lambda _: None)
    for step in (10, 20, 10, 20):
        says(fake, step)
        writer.poll()
    assert [row["step"] for row in rows(path)] == ["20", "20"]


def test_the_file_is_bounded_and_other_columns_are_moved_aside(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_text("step,loss\n1,2\n")
    windows.append(path, "1,2\n")
    assert path.read_text() == windows.HEADER + "1,2\n"
    monkeypatch.setattr(windows, "MAX_FILE_BYTES", len(windows.HEADER) + 100)
    for _ in range(100):
        windows.append(path, "1,2\n")
    assert path.stat().st_size < len(windows.HEADER) + 110
    assert sorted(p.name for p in path.parent.iterdir() if "losses" in p.name) == [
        "losses.csv", "losses.csv.1",
    ]  # fmt: skip


def test_a_torn_row_spoils_no_other(path: Path) -> None:
    windows.append(path, "1,2\n")
    with path.open("a") as file:
        file.write("1,")
    windows.append(path, "1,3\n")
    assert path.read_text().splitlines()[-1] == "1,3"


def test_a_link_in_its_place_is_not_followed(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("")
    path.symlink_to(other)
    with pytest.raises(ConfigError, match="is a link"):
        windows.append(path, "1\n")
    assert other.read_text() == ""


def test_a_row_that_cannot_be_written_is_told(
    fake: FakeNode, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Windows(path, fake.node, lambda _: None)
    says(fake, 10)
    writer.poll()
    monkeypatch.setattr(os, "write", lambda _fd, _data: 3)  # a full disk takes a part
    says(fake, 20)
    writer.poll()
    assert "(1 rows lost): [Errno 28]" in fake.text("losses-failing")
    monkeypatch.undo()
    says(fake, 30)
    writer.poll()
    assert "losses-failing" not in fake.codes
    assert [row["step"] for row in rows(path)] == ["30"]


def test_what_was_last_known_outlives_the_daemon(fake: FakeNode, tmp_path: Path) -> None:
    says(fake, 340)
    for _ in range(2):  # the second time in a file that has the table
        store = Store.open(tmp_path / "state.sqlite")
        Windows(tmp_path / "losses.csv", fake.node, store.keep_known).remember()
        store.close()
    store = Store.open(tmp_path / "state.sqlite")
    later = FakeNode()
    later.supervisor.trainer = None
    later.record.known = store.last_known()
    later.clock.now = fake.clock() + 100
    status = later.node.status()
    assert (status.progress.step, status.privacy.epsilon_spent) == (340, 3.2)
    assert (status.trainer_runs, status.progress_age_s) == (False, 100.0)
    store._database.execute("UPDATE known SET value = '{}'")
    assert store.last_known() is None
    store.close()
