"""A parquet file with two columns of one name is one line, not a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.in_memory import load_documents
from xpeer.errors import ConfigError

pa = pytest.importorskip("pyarrow", reason="the extra xpeer[parquet] is not installed")
parquet = pytest.importorskip("pyarrow.parquet")


def outcome(path: Path) -> str:
    try:
        return repr([document.text for document in load_documents([str(path)])])
    except ConfigError as e:
        return f"refused: {e}"
    except Exception as e:  # noqa: BLE001 - what the case is about
        return f"traceback: {type(e).__name__}"


def test_two_columns_text(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    said = outcome(tmp_path / "a.parquet")
    assert said.startswith("refused: ")
    assert "has 2 columns named 'text'" in said


def test_two_other_columns(tmp_path: Path) -> None:
    columns = [pa.array(["a"]), pa.array([1]), pa.array([2])]
    table = pa.Table.from_arrays(columns, names=["text", "n", "n"])
    parquet.write_table(table, tmp_path / "a.parquet")
    assert outcome(tmp_path / "a.parquet") == "['a']"


def test_two_columns_of_a_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,text\na,b\n")
    assert "has 2 columns named 'text'" in outcome(tmp_path / "a.csv")
