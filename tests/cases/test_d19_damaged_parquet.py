"""Damage to a parquet file is called damage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.in_memory import load_documents
from xpeer.errors import ConfigError

pa = pytest.importorskip("pyarrow", reason="the extra xpeer[parquet] is not installed")
parquet = pytest.importorskip("pyarrow.parquet")


def write(path: Path, **options: Any) -> bytearray:
    texts = [f"text number {n} " * 20 for n in range(500)]
    parquet.write_table(pa.table({"text": texts}), path, use_dictionary=False, **options)
    return bytearray(path.read_bytes())


def said(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_documents([str(path)])
    return str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "snappy"},
        {"compression": "zstd"},
        {"compression": "gzip"},
        {"compression": "none", "write_page_checksum": True},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_a_damaged_page(tmp_path: Path, options: dict[str, Any]) -> None:
    path = tmp_path / "a.parquet"
    data = write(path, **options)
    middle = len(data) // 3
    data[middle : middle + 60] = bytes(60)
    path.write_bytes(data)
    message = said(path)
    assert "damaged" in message
    assert "owner and mode" not in message


@pytest.mark.parametrize("keep", [0, 4, 50, -1, -9, -200])
def test_a_truncated_file(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(write(path)[:keep])
    assert "damaged" in said(path)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_text("this is no table at all, whatever its name says")
    assert "no Parquet file" in said(path)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.parquet")

    def refuse(*_: object) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    message = said(tmp_path / "a.parquet")
    assert "Permission denied" in message
    assert "owner and mode" in message
