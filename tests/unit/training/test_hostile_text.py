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
