"""Text that `ls` shows is trained on, or counted with the reason why not."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.in_memory import load_documents
from xpeer.errors import ConfigError


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A shard with a link to another folder."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("from elsewhere")
    (tmp_path / "shard").mkdir()
    (tmp_path / "shard" / "a.txt").write_text("from the shard")
    (tmp_path / "shard" / "more").symlink_to(tmp_path / "elsewhere")
    return tmp_path / "shard"


def texts(*patterns: Path | str) -> list[str]:
    return [document.text for document in load_documents([str(p) for p in patterns])]


def test_a_folder_behind_a_link_is_read(linked: Path) -> None:
    assert texts(linked) == ["from the shard", "from elsewhere"]
    assert texts(f"{linked}/**/*.txt") == texts(linked)


@pytest.mark.parametrize("pattern", ["", "/**", "/**/*.txt", "/*"])
def test_loops_end_and_files_count_once(linked: Path, pattern: str) -> None:
    from tests.in_memory import read_shard

    for name in ("loop", "loop2"):
        (linked / name).symlink_to(linked)
    (linked.parent / "elsewhere" / "back").symlink_to(linked)
    os.link(linked / "a.txt", linked / "hard.txt")
    (linked / "soft.txt").symlink_to("a.txt")
    found = read_shard([f"{linked}{pattern}", str(linked / "a.txt"), str(linked / "more")])
    assert sorted(d.text for d in found.documents) == ["from elsewhere", "from the shard"]
    assert (found.summary.files, found.summary.repeated) == (2, 0)


@pytest.mark.parametrize("pattern", ["", "/**", "/*"])
def test_what_is_left_out_is_counted(linked: Path, pattern: str) -> None:
    from tests.in_memory import read_shard

    os.mkfifo(linked / "pipe.txt")
    (linked / "broken.txt").symlink_to("nowhere.txt")
    (linked / "round.txt").symlink_to("round.txt")
    (linked / ".secret").mkdir()
    (linked / ".hidden.txt").write_text("hidden")
    (linked / "odd.\x1b[31m").write_text("")
    for name in ("a.pdf", "b.pdf", "c.json", "page.txt"):
        (linked / name).write_text("<!DOCTYPE html><p>mark-up")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(linked / "s.txt"))
        found = read_shard([f"{linked}{pattern}"])
    others = {"other": 1} if pattern == "" else {}
    assert found.summary.left_out == {
        "pipe": 1, "broken link": 2, "hidden": 2, ".pdf": 2, ".json": 1, "mark-up": 1,
        "socket": 1, **others,
    }  # fmt: skip
    assert "\x1b" not in " ".join(found.summary.lines())


def test_what_one_pattern_leaves_out_another_may_name(linked: Path) -> None:
    from tests.in_memory import read_shard

    (linked / "notes.rst").write_text("notes")
    found = read_shard([str(linked), str(linked / "notes.rst")])
    assert len(found.documents) == 3
    assert found.summary.left_out == {}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkfifo, "is a pipe"),
        (lambda path: path.symlink_to("nowhere"), "is a link to nowhere, which is not there"),
        (lambda path: path.symlink_to("/dev/null"), "is a device"),
        (lambda path: path.mkdir(), "holds no file of .txt, .md, .jsonl, .parquet, .csv"),
    ],
    ids=["pipe", "broken link", "device", "empty folder"],
)
def test_what_is_named_and_can_not_be_read_is_an_error(
    tmp_path: Path, make: Any, words: str
) -> None:
    make(tmp_path / "named.txt")
    with pytest.raises(ConfigError, match=words):
        texts(tmp_path / "named.txt")


@pytest.mark.parametrize("pattern", ["", "/**/*.txt", "/*/*.txt"])
def test_a_folder_that_can_not_be_searched_is_an_error(
    linked: Path, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (linked / "locked").mkdir()
    real = os.scandir

    def refuse(path: str | Path) -> Any:  # root may read everything
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    def listdir(path: str | Path) -> list[str]:
        with refuse(path) as entries:
            return [entry.name for entry in entries]

    monkeypatch.setattr(os, "scandir", refuse)
    monkeypatch.setattr(os, "listdir", listdir)
    with pytest.raises(ConfigError, match=r"locked can't be searched: Permission denied"):
        texts(f"{linked}{pattern}")
