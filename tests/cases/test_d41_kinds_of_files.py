"""Files that are no plain text are read for what they are, or refused for it."""

from __future__ import annotations

import gzip
import json
from functools import partial
from pathlib import Path

import pytest

from tests.in_memory import load_documents, read_shard
from xpeer.errors import ConfigError
from xpeer.trainer.text import read_table
from xpeer.training.reading import Recipe
from xpeer.training.tokenising import ignore
from xpeer.training.tokenizer import ByteTokenizer

HTML = "<!DOCTYPE html>\n<html><body><p>Some words.</p></body></html>\n"


def outcome(path: Path | str) -> str:
    try:
        return repr([document.text for document in load_documents([str(path)])])
    except ConfigError as e:
        return f"refused: {e}"


def test_csv_is_read_by_its_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('id,text\n1,"one, two"\n2,"three\nfour"\n')
    assert outcome(tmp_path / "a.csv") == "['one, two', 'three\\nfour']"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.tsv", "text\tid\none, two\t1\n", "['one, two']"),
        ("a.csv", "id;text\n1;one\n", "['one']"),
        ("a.csv", "\ufefftext\r\none\r\n", "['one']"),
        ("a.csv", "text\n" + "x" * 200_000 + "\n", repr(["x" * 200_000])),
        ("a.csv", "id,body\n1,one\n", "refused: {}: no row has field 'text' (fields: body, id)"),
        ("a.csv", 'id,text\n1,"one\n', "refused: {}: not valid CSV after line"),
        ("a.csv", "", "refused: data.shard: no text in {} (1 row without text: empty 1)"),
        ("a.csv", "\n \n\n", "refused: data.shard: no text in {} (1 row without text: empty 1)"),
        ("a.csv", "\n\r\nid;text\n1;one\n", "['one']"),
        ("a.csv", "\ufeff,,\n\nid,text,\n1,one,\n", "['one']"),
        ("a.tsv", "\t\n\ntext\tid\none\t1\n", "['one']"),
        # what is left of a text at its first comma is not what somebody wrote
        (
            "a.csv",
            "text\none\ntwo, three\n",
            "refused: {}:3: 2 fields, but the header",
        ),
        ("a.csv", '\nid,text\n1,"o\nn"\n2,two, three\n', "refused: {}:5: 3 fields, but the header"),
        ("a.csv", "id,text\n1,one,,\n", "['one']"),
        ("a.ndjson", '{"text": "one"}\n', "['one']"),
        ("a.py", "print(1)", "['print(1)']"),
        ("a.rst", "Title", "['Title']"),
    ],
)
def test_what_is_read(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert outcome(tmp_path / name).startswith(said.format(tmp_path / name))


def test_a_table_in_a_folder_that_begins_with_an_empty_line_is_read(tmp_path: Path) -> None:
    """Its header was taken for one without the column, and the whole table left out."""
    (tmp_path / "a.csv").write_text("\n\nid,text\n1,one\n")
    found = read_shard([str(tmp_path)])
    assert [document.text for document in found.documents] == ["one"]
    assert not found.summary.left_out


def test_a_csv_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text\none\xff\n")
    assert "not UTF-8" in outcome(tmp_path / "a.csv")


@pytest.mark.parametrize("name", ["a.txt.gz", "a.md.gz", "a.gz", "A.TXT.GZ"])
def test_a_packed_text_is_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"some words", mtime=0))
    assert outcome(tmp_path / name) == "['some words']"


def test_packed_rows_are_read(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(3))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b"text\nrow 9\n", mtime=0))
    assert outcome(tmp_path / "a.jsonl.gz") == "['row 0', 'row 1', 'row 2']"
    assert outcome(f"{tmp_path}/*.gz") == "['row 0', 'row 1', 'row 2', 'row 9']"


@pytest.mark.parametrize("cut", [-1, 15])
def test_a_damaged_pack_says_so(tmp_path: Path, cut: int) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"some words " * 50)[:cut])
    assert "a.txt.gz is damaged" in outcome(tmp_path / "a.txt.gz")
    (tmp_path / "b.txt.gz").write_text("not packed at all")
    assert "b.txt.gz is damaged" in outcome(tmp_path / "b.txt.gz")


def test_a_pack_may_not_burst(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from xpeer.training.formats import packed

    monkeypatch.setattr(packed, "UNPACKED_FREE", 1 << 20)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(bytes(3 << 20)))
    assert "unpacks to more than 200 times its size" in outcome(tmp_path / "a.txt.gz")


@pytest.mark.parametrize(
    "name",
    [
        *("a.html", "a.HTM", "a.xml", "a.pdf", "a.docx", "a.zip", "a.json", "a.ipynb", "a.tar.gz"),
        *("a.parquet.zst", "a.txt.bz2", "a.parquet.gz", "a.html.gz"),
    ],
)
def test_other_kinds_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(HTML)
    said = outcome(tmp_path / name)
    assert said.startswith("refused: data.shard: ")
    assert f"{name} is not read as text - " in said


@pytest.mark.parametrize("text", [HTML, "\ufeff\n <HTML>", '<?xml version="1.0"?><a/>'])
def test_mark_up_in_a_text_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert "is mark-up" in outcome(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"%PDF-1.7\n\xe2\xe3", "is a PDF"),
        (b"PK\x03\x04\xff\xff", "is a zip file"),
        (gzip.compress(b"words", mtime=0), "is packed with gzip"),
        ("words".encode("utf-16"), "is UTF-16"),
        ("words".encode("utf-16-le"), "characters are NUL: UTF-16"),
        (b"caf\xe9", "byte 3 is not UTF-8"),
    ],
)
def test_a_false_name_is_noticed(tmp_path: Path, data: bytes, what: str) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    assert what in outcome(tmp_path / "a.txt")
    (tmp_path / "a.jsonl").write_bytes(data)
    if "NUL" not in what:
        assert what in outcome(tmp_path / "a.jsonl")


def test_a_text_packed_with_zstd_is_read(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pack = pa.Codec("zstd").compress
    # two frames, as `pzstd` and `cat` make them
    (tmp_path / "a.txt.zst").write_bytes(
        pack(b"some ", asbytes=True) + pack(b"words", asbytes=True)
    )
    rows = "".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(3))
    (tmp_path / "b.jsonl.zst").write_bytes(pack(rows.encode(), asbytes=True))
    assert outcome(tmp_path / "a.txt.zst") == "['some words']"
    assert outcome(tmp_path) == "['some words', 'row 0', 'row 1', 'row 2']"
    packed = pack(b"words " * 999, asbytes=True)
    for data in (packed[:-4], b"not packed at all"):
        (tmp_path / "a.txt.zst").write_bytes(data)
        assert "a.txt.zst is damaged" in outcome(tmp_path / "a.txt.zst")


def test_packed_texts_are_read_in_folders(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"some words", mtime=0))
    (tmp_path / "b.html.gz").write_bytes(gzip.compress(b"<html>", mtime=0))
    (tmp_path / "c.tar.gz").write_bytes(gzip.compress(b"files", mtime=0))
    assert outcome(tmp_path) == "['some words']"


def test_what_datasets_saved_is_read(tmp_path: Path) -> None:
    """`save_to_disk` writes streams of Arrow, state.json and dataset_info.json."""
    pa = pytest.importorskip("pyarrow")
    folder = tmp_path / "train"
    folder.mkdir()
    table = pa.table({"id": [1, 2, 3], "text": ["one", None, "two"]})
    for name, text in (("data-00000-of-00001.arrow", table), ("cache-12.arrow", table)):
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, text.schema) as w:
            w.write_table(text)
    assert "holds no file" in outcome(tmp_path)
    (folder / "state.json").write_text("{}")
    assert "holds no file" in outcome(tmp_path)
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": "train"})
    )
    assert outcome(tmp_path) == "['one', 'two']"
    with (
        pa.OSFile(str(tmp_path / "file.arrow"), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as w,
    ):
        w.write_table(table)
    assert outcome(tmp_path / "file.arrow") == "['one', 'two']"
    (tmp_path / "file.arrow").write_bytes(b"ARROW1 and no more")
    assert "file.arrow is damaged" in outcome(tmp_path / "file.arrow")


def test_what_an_earlier_save_left_is_left_out_and_counted(tmp_path: Path) -> None:
    """Rows that somebody took out of a data set were still trained on."""
    pa = pytest.importorskip("pyarrow")
    for name, text in (("data-00000-of-00001", "new"), ("data-00001-of-00002", "taken out")):
        table = pa.table({"text": [text]})
        with (
            pa.OSFile(str(tmp_path / f"{name}.arrow"), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as stream,
        ):
            stream.write_table(table)
    (tmp_path / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]})
    )
    found = read_shard([str(tmp_path)])
    assert [document.text for document in found.documents] == ["new"]
    assert found.summary.left_out == {".arrow": 1, ".json": 1}
    assert "taken out" in outcome(tmp_path / "data-00001-of-00002.arrow")  # who names it means it


@pytest.mark.parametrize(
    "content", ["", "[" * 10**5, "[]", '{"_data_files": [1]}', '{"_data_files": {}}']
)
def test_another_programs_state_is_no_list_of_files(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "a.arrow").write_text("no table")
    (tmp_path / "state.json").write_text(content)
    assert outcome(tmp_path) == "['words']"


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """A folder with two tables of texts, one of numbers, and one that is no table."""
    folder = tmp_path / "tables"
    (folder / "more").mkdir(parents=True)
    (folder / "a.csv").write_text('id,text\n1,"one, two"\n2,three\n')
    (folder / "more" / "b.csv.gz").write_bytes(gzip.compress(b"text;id\nfour;4\n"))
    (folder / "numbers.csv").write_text("x,y\n1,2\n")
    (folder / "odd.csv").write_bytes(b'"\xff\xfe never closed')
    return folder


def test_tables_in_a_folder_are_read_if_they_have_the_column(tables: Path) -> None:
    found = read_shard([str(tables)])
    assert [each.text for each in found.documents] == ["one, two", "three", "four"]
    assert found.summary.left_out == {"table without the column": 2}
    for pattern in (tables, f"{tables}/*.csv"):
        with pytest.raises(ConfigError, match="no text in"):
            read_shard([str(pattern)], "messages")


def test_tables_become_tokens(tables: Path, tmp_path: Path) -> None:
    recipe = Recipe(ByteTokenizer())
    read = partial(read_table, [str(tables)], "data.shard", cache=tmp_path / "cache")
    for _ in range(2):  # from the cache, too
        table, summary = read(recipe=recipe, on_progress=ignore)
        assert table.characters.tolist() == [8, 5, 4]
        assert summary.left_out == {"table without the column": 2}
    with pytest.raises(ConfigError, match=r"a\.csv: no row has field 'body' .fields: id, text"):
        read(recipe=Recipe(ByteTokenizer(), "body"), on_progress=ignore)


def test_a_damaged_table_that_has_the_column_is_an_error(tables: Path) -> None:
    (tables / "odd.csv").write_bytes(b"text\n" + b"x\n" * 10_000 + b"\xff\n")
    assert "odd.csv: not UTF-8, somewhere after line" in outcome(tables)
