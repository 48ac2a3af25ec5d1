"""Every way that Arrow stores text is text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.in_memory import load_documents
from xpeer.errors import ConfigError

pa = pytest.importorskip("pyarrow", reason="the extra xpeer[parquet] is not installed")
parquet = pytest.importorskip("pyarrow.parquet")

TEXTS = ["one", None, "zwei é", "one", "", "drei"]
KINDS: dict[str, Any] = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "dictionary<string>": pa.dictionary(pa.int32(), pa.string()),
    "dictionary<large_string>": pa.dictionary(pa.int8(), pa.large_string()),
    "dictionary<binary>": pa.dictionary(pa.int32(), pa.binary()),
    "binary": pa.binary(),
    "large_binary": pa.large_binary(),
    "binary_view": pa.binary_view(),
}


def column(kind: Any, values: list[str | None]) -> Any:
    plain = pa.array(values, pa.string())
    if pa.types.is_dictionary(kind):
        return plain.cast(kind.value_type).dictionary_encode().cast(kind)
    return plain.cast(kind)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_all_text_types(tmp_path: Path, kind: Any) -> None:
    chunks = pa.chunked_array([column(kind, TEXTS[:2]), column(kind, TEXTS[2:])])
    table = pa.table({"text": chunks, "n": list(range(6))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    try:
        found = [document.text for document in load_documents([str(tmp_path)])]
    except ConfigError as e:
        found = [str(e)]
    assert found == ["one", "zwei é", "drei"]


def test_a_column_of_nulls_beside_one_with_text(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": pa.nulls(3)}), tmp_path / "a.parquet")
    parquet.write_table(pa.table({"text": ["one"]}), tmp_path / "b.parquet")
    assert [d.text for d in load_documents([str(tmp_path)])] == ["one"]


def test_bytes_that_are_not_utf8_are_located(tmp_path: Path) -> None:
    table = pa.table({"text": pa.array([b"good", b"b\xff"], pa.binary())})
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"row 2: byte 1 of the text is not UTF-8"):
        load_documents([str(tmp_path)])


@pytest.mark.parametrize("values", [[1, 2], [["a"]], [{"a": "b"}], [True]])
def test_what_is_no_text(tmp_path: Path, values: list[Any]) -> None:
    parquet.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="column 'text' is no text but"):
        load_documents([str(tmp_path)])
