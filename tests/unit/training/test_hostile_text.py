"""Text folders that somebody else has made: links, files that burst, files that are no text."""

from __future__ import annotations

from pathlib import Path

import pytest

from xpeer.errors import ShardError
from xpeer.training.documents import read_shard


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
