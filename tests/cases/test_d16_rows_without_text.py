"""Rows without text are skipped and counted, by one rule for all formats."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from tests.in_memory import load_documents
from xpeer.errors import ConfigError

ROWS: list[dict[str, Any]] = [
    {"id": 1, "text": "good"},
    {"id": 2, "text": None},
    {"id": 3, "text": ""},
    {"id": 4, "text": " \n\u200b"},
    {"id": 5, "text": "good too"},
]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pa = pytest.importorskip("pyarrow", reason="the extra xpeer[parquet] is not installed")
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(rows), path)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_files(path: Path, rows: list[dict[str, Any]]) -> None:
    path.mkdir()
    for row in rows:
        (path / f"{row['id']}.txt").write_text(row["text"] or "")


FORMATS = [
    ("a.jsonl", write_jsonl),
    ("a.parquet", write_parquet),
    ("a.csv", write_csv),
    ("folder", write_files),
]


@pytest.mark.parametrize(("name", "write"), FORMATS, ids=[name for name, _ in FORMATS])
def test_they_are_skipped(tmp_path: Path, name: str, write: Any) -> None:
    write(tmp_path / name, ROWS)
    try:
        found = load_documents([str(tmp_path / name)])
    except ConfigError as e:
        found = []
        assert not e, "rows without text are fatal"
    assert [document.text for document in found] == ["good", "good too"]


@pytest.mark.parametrize(("name", "write"), FORMATS, ids=[name for name, _ in FORMATS])
def test_they_are_counted(tmp_path: Path, name: str, write: Any) -> None:
    from tests.in_memory import read_shard

    write(tmp_path / name, ROWS)
    skipped = read_shard([str(tmp_path / name)]).summary.skipped
    assert sum(skipped.values()) == 3
    with_null = name in ("a.jsonl", "a.parquet")
    assert skipped == ({"null": 1, "empty": 2} if with_null else {"empty": 3})


def test_other_rows_of_json(tmp_path: Path) -> None:
    from tests.in_memory import read_shard

    rows = [*ROWS, {"id": 6}, {"text": 7}, {"text": ["list"]}, {"text": {"a": "b"}}, {}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    found = read_shard([str(tmp_path)])
    assert found.summary.skipped == {"null": 1, "empty": 2, "no field": 2, "not text": 3}
    assert len(found.documents) == 2


@pytest.mark.parametrize(("name", "write"), FORMATS[:3], ids=[name for name, _ in FORMATS[:3]])
def test_a_field_that_no_row_has_is_an_error(tmp_path: Path, name: str, write: Any) -> None:
    write(tmp_path / name, ROWS)
    with pytest.raises(ConfigError, match=r"no .* 'body' \(\w+: id, text\)"):
        load_documents([str(tmp_path / name)], "body")


def test_a_field_that_never_holds_text_is_an_error(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(ConfigError, match="field 'id' is no text but a number"):
        load_documents([str(tmp_path)], "id")


def test_rows_that_are_all_empty_are_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS[1:4])
    with pytest.raises(ConfigError, match=r"no text in .*3 rows without text: empty 2, null 1"):
        load_documents([str(tmp_path)])
