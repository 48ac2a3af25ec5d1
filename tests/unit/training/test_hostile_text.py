"""Text folders that somebody else has made: links, files that burst, files that are no text."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.in_memory import read_shard
from xpeer.errors import ShardError
from xpeer.status import ShardSummary
from xpeer.training.formats import parquet as parquet_format
from xpeer.training.formats import texts


def test_a_parquet_file_of_few_bytes_takes_no_gigabyte(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    value = "a b " * (1 << 17)
    path = tmp_path / "a.parquet"
    table = pa.table({"text": pa.DictionaryArray.from_arrays([0] * 400 + [None], [value])})
    parquet.write_table(table, path, compression="zstd", store_schema=False)
    before = pa.default_memory_pool().max_memory()
    found = read_shard([str(path)], "text", "data.shard")
    assert pa.default_memory_pool().max_memory() - before < 16 << 20
    assert [document.text for document in found.documents] == [value]
    assert (found.summary.repeated, found.summary.skipped) == (399, {"null": 1})


def test_a_parquet_file_that_unpacks_to_far_more_is_refused(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [" " * (1 << 20) + str(n) for n in range(65)], "other": [""] * 65})
    parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    with pytest.raises(ShardError, match="more than 200 times the file's size"):
        read_shard([str(path)], "text", "data.shard")


def write_arrow(path: Path, table: Any) -> None:
    from pyarrow import ipc

    with ipc.new_stream(str(path), table.schema) as stream:
        stream.write_table(table)  # one batch


def write_parquet(path: Path, table: Any, **options: Any) -> None:
    from pyarrow import parquet

    parquet.write_table(table, path, compression="none", write_batch_size=1, **options)


def large(count: int, size: int) -> list[str]:
    return [random.Random(n).randbytes(size // 2).hex() for n in range(count)]


LARGE: dict[str, tuple[str, Callable[[], list[str]], Callable[[Path, Any], None]]] = {
    "arrow": ("a.arrow", lambda: large(64, 1 << 20), write_arrow),
    "rows of 1 MB": (
        "a.parquet", lambda: large(64, 1 << 20), partial(write_parquet, use_dictionary=False),
    ),
    "a group of 64 MB": ("a.parquet", lambda: large(1 << 15, 2048), write_parquet),
    "a text of 1 MB, again and again": (
        "a.parquet", lambda: large(1, 1 << 20) * 300 + large(40 << 10, 1000),
        partial(write_parquet, dictionary_pagesize_limit=2 << 20),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "made", "write"), LARGE.values(), ids=LARGE)
def test_large_rows_are_not_all_in_memory(
    tmp_path: Path,
    name: str,
    made: Callable[[], list[str]],
    write: Callable[[Path, Any], None],
) -> None:
    """A thousand rows were read at once, whatever they held: 4 GB of rows of 4 MB."""
    pa = pytest.importorskip("pyarrow")
    rows = made()
    write(tmp_path / name, pa.table({"text": rows}))
    before = pa.total_allocated_bytes()
    most = 0
    tracemalloc.start()
    try:
        for number, text in enumerate(texts(tmp_path / name, "text", Counter(), named=True)):
            assert text == rows[number]
            most = max(most, pa.total_allocated_bytes() - before)
        in_python = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert number == len(rows) - 1
    assert most < 48 << 20
    assert in_python < 16 << 20


def test_groups_of_all_sizes_are_read_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(parquet_format, "_BATCH_BYTES", 1000)
    rows = [f"{n:x}" * size for size in (1, 900, 1, 2000, 1) for n in range(20, 30)]
    rows += ["again"] * 10
    with parquet.ParquetWriter(tmp_path / "a.parquet", pa.schema({"text": pa.string()})) as file:
        for at in range(0, len(rows), 10):
            file.write_table(pa.table({"text": rows[at : at + 10]}), row_group_size=10)
    assert list(texts(tmp_path / "a.parquet", "text", Counter(), named=True)) == rows


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"<!-- c --><html><body>mark</body></html>", "mark-up (HTML or XML)"),
        (b"\n<!-- c -->\n<!-- d -->\n<!DOCTYPE html>", "mark-up (HTML or XML)"),
        (b"<head><title>x</title></head>", "mark-up (HTML or XML)"),
        (b"<BODY bgcolor=x>", "mark-up (HTML or XML)"),
        (b"<rss version='2.0'>", "mark-up (HTML or XML)"),
        (b"{\\rtf1\\ansi hello}", "mark-up (RTF)"),
        (b"%!PS-Adobe-3.0 x", "mark-up (PostScript)"),
        (b"SQLite format 3\0" + b"abc " * 9, "an SQLite database"),
        (b"PK\x03\x04 words", "a zip file"),
        (b'{"text":"a"}\n{"text":"b"}\n', "JSON"),
        (b'\xef\xbb\xbf\n{"text": "a"}', "JSON"),
        (b'[\n  {"text": "a"}\n]\n', "JSON"),
        (b'{\n  "text": "a"\n}\n', "JSON"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.md", "README"])
def test_what_is_no_plain_text_is_refused_or_left_out(
    tmp_path: Path, data: bytes, said: str, name: str
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(ShardError) as caught:
        read_shard([str(path)], "text", "data.shard")
    assert f"{name} is {said}" in str(caught.value)
    if name == "a.txt" and "a " not in said and "an " not in said:
        (tmp_path / "good.txt").write_text("words")
        found = read_shard([str(tmp_path)], "text", "data.shard")
        assert found.summary.left_out == {said.partition(" ")[0]: 1}


@pytest.mark.parametrize(
    "text",
    [
        "<!-- c -->\n# Title\n<html> is a tag",
        '<div align="center">\n\n# Title',
        "<header>",
        "[1] A reference.\n[2] Another.",
        "{} and [] are empty",
        "[x]",
        "[1]",
        "{}",
        "<!---->" * 9_000 + "words",
    ],
)
def test_plain_text_is_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.md").write_text(text)
    found = read_shard([str(tmp_path)], "text", "data.shard")
    assert [document.text for document in found.documents] == [text]


@pytest.mark.parametrize("text", ["\ufffd\ufffd \ufffd", "\ufffc"])
def test_lost_characters_are_no_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(ShardError, match="no text in"):
        read_shard([str(tmp_path)], "text", "data.shard")


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, with a diary, a hidden folder, and downloads that links may be in."""
    user = tmp_path / "user"
    monkeypatch.setenv("HOME", str(user))
    for name in ("diary.txt", ".secret/key.txt", "more/deep/more.txt", "downloads/set/a.txt"):
        (user / name).parent.mkdir(parents=True, exist_ok=True)
        (user / name).write_text(f"text of {name}")
    return user


def read(*patterns: Path | str) -> tuple[list[str], ShardSummary]:
    found = read_shard([str(p) for p in patterns], "text", "data.shard")
    return sorted(document.text.removeprefix("text of ") for document in found.documents), (
        found.summary
    )


@pytest.mark.parametrize("pattern", ["", "/**/*.txt", "/*", "/**"])
@pytest.mark.parametrize(
    ("target", "why"),
    [
        (".", "link to a folder above"),
        ("..", "link to a folder above"),
        ("../..", "link to a folder above"),
        ("/", "link to a folder above"),
        ("../../.secret", "hidden"),
        ("../../.secret/key.txt", "hidden"),
    ],
)
def test_links_that_lead_away_are_left_out(user: Path, pattern: str, target: str, why: str) -> None:
    folder = user / "downloads" / "set"
    (folder / "img.txt").symlink_to(target)
    read_texts, summary = read(f"{folder}{pattern}")
    assert read_texts == ["downloads/set/a.txt"]
    assert summary.left_out == {why: 1}
    assert summary.outside == {}


def test_a_link_to_the_home_folder_from_elsewhere(user: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "b.txt").write_text("b")
    (tmp_path / "data" / "up").symlink_to(user)
    read_texts, summary = read(tmp_path / "data")
    assert (read_texts, summary.left_out) == (["b"], {"link to the home folder": 1})
    assert len(read(user)[0]) == 3  # who names it means it


@pytest.mark.parametrize("pattern", ["", "/**/*.txt"])
def test_files_that_links_reach_outside_are_counted(user: Path, pattern: str) -> None:
    folder = user / "downloads" / "set"
    (folder / "more").symlink_to("../../more")
    (folder / "one.txt").symlink_to("../../diary.txt")
    (folder / "inside.txt").symlink_to("a.txt")
    (user / "more" / "back").symlink_to("..")
    (user / "more" / "deep" / "secret.txt").symlink_to("../../.secret/key.txt")
    read_texts, summary = read(f"{folder}{pattern}")
    assert read_texts == ["diary.txt", "downloads/set/a.txt", "more/deep/more.txt"]
    assert summary.outside == {str(folder): 2}
    assert f"2 files outside {folder}" in summary.lines()
    assert summary.left_out == {"hidden": 1, "link to a folder above": 1}
    assert read(f"{folder}{pattern}", user / "more", user / "diary.txt")[1].outside == {}


def test_a_hidden_place_that_was_named_is_read(user: Path) -> None:
    (user / ".secret" / "set").mkdir()
    (user / ".secret" / "set" / "up.txt").symlink_to("../key.txt")
    (user / ".secret" / "set" / ".objects").mkdir()
    (user / ".secret" / "set" / ".objects" / "1").write_text("annexed")
    (user / ".secret" / "set" / "b.txt").symlink_to(".objects/1")
    read_texts, summary = read(user / ".secret" / "set")
    assert read_texts == [".secret/key.txt", "annexed"]
    assert summary.outside == {str(user / ".secret" / "set"): 1}


def test_a_glob_of_links_that_lead_away_says_so(user: Path) -> None:
    (user / "downloads" / "up").symlink_to("..")
    with pytest.raises(ShardError, match=r"left out: link to a folder above 1"):
        read(f"{user}/downloads/u*/*.txt")
