"""What is read of a file has a name, which decides whether tokens that were made before count."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any, Final

import pytest

from xpeer.errors import ShardError
from xpeer.training.files import find
from xpeer.training.formats import texts
from xpeer.training.reading import READING, Begin, End, Part, Recipe, events_of
from xpeer.training.sources import Source
from xpeer.training.tokenizer import ByteTokenizer

PINNED: Final = {"reading/2": "c876c56eeff0c51f593426dad68ff3d0"}
"""What `READING` stands for. If the digest is another one, what is read has changed: give it a new
name and pin that, or every node keeps what it read before of files that did not change."""

USER, ANSWER = (
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "Four."},
)
ROWS: Final[list[dict[str, Any]]] = [
    {"text": "one", "prompt": "a ", "completion": "b", "messages": [USER, ANSWER]},
    {"text": None, "prompt": "a", "completion": " ", "messages": [USER]},
    {"text": " \n", "prompt": "", "completion": "c", "messages": [USER, ANSWER | {"weight": 0}]},
    {"text": " two\u00e9\n", "prompt": "a", "completion": None, "messages": None},
]
LISTS: Final = [
    {"prompt": [USER], "completion": [ANSWER]},
    {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]},
    {"prompt": [USER], "completion": [USER]},
    {"prompt": [USER], "completion": [ANSWER | {"tool_calls": [{"id": "1"}]}]},
]
LINES: Final = [
    {"text": 7}, {"text": ["a"]}, {"other": "a"}, {"text": "a\u200b"}, {"text": "\ufeffb"},
    {"messages": [ANSWER]}, {"messages": "a"}, {"prompt": "a"},
    {"messages": [USER, ANSWER | {"function_call": {"name": "f"}}]},
]  # fmt: skip
FILES: Final = {
    "plain.txt": b"\xef\xbb\xbfA text.\r\nOf two lines.\n",
    "blank.txt": "\u2800 \n".encode(),
    "page.txt": b"<!-- c --><html>x",
    "json.md": b'{"a": 1}\n{"a": 2}',
    "notes.rst": b"{}",
    "nul.txt": b"a\0\0",
    "halves.txt": b"a\xff",
    "packed.txt.gz": gzip.compress(b"packed", mtime=0),
    "long.txt": b"word " * 30_000,
    "rows.jsonl": b"\n".join(json.dumps(row).encode() for row in [*ROWS, *LINES]) + b"\n\n",
    "lists.jsonl": b"\n".join(json.dumps(row).encode() for row in LISTS),
    "broken.jsonl": b'{"text": "a"}\n{"text',
    "halves.jsonl": b'{"text": "\\ud83d"}',
    "table.csv": b'\n,,\nid,text,prompt,completion\n1,"a, b\nc",d,e\n2\n\n3,,,\n4,x,y,z,,\n',
    "table.tsv": b"text\tid\na, b\t1\n",
    "bars.csv": b"text|id\na, b|1\n",
    "wide.csv": b"text\na\nb, c\n",
    "open.csv": b'text\n"a\n',
    "others.csv": b"body\na\n",
    "empty.csv": b"\n\n",
}


def write_tables(folder: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import ipc, parquet

    for name, rows in (("rows", ROWS), ("lists", LISTS)):
        table = pa.Table.from_pylist(rows)
        parquet.write_table(table, folder / f"{name}.parquet")
        with ipc.new_stream(str(folder / f"{name}.arrow"), table.schema) as stream:
            stream.write_table(table)
    parquet.write_table(pa.table({"text": [b"bytes", b"\xc3\xa9", None]}), folder / "bytes.parquet")
    with ipc.new_file(str(folder / "file.arrow"), pa.schema({"text": pa.large_string()})) as file:
        file.write_table(pa.table({"text": pa.array(["large"], pa.large_string())}))


def read(path: Path, field: str, *, named: bool) -> list[object]:
    """All that reading a file brings, or that it is an error."""
    skipped: Counter[str] = Counter()
    try:
        if field != "text":
            made = list(texts(path, field, skipped, named=named))
            examples = [(each.id, each.turns, sorted(each.read)) for each in made]  # type: ignore[union-attr]
            return [*examples, sorted(skipped.items())]
        events = list(events_of(Source(path, named), Recipe(ByteTokenizer(), field, 70_000), BEGIN))
    except ShardError:
        return ["error"]
    seen: list[object] = []
    for each in events:
        if isinstance(each, Part):
            head = each.head
            seen.append((head.id.hex(), head.whole.hex(), head.begins, head.ends, each.text))
        elif isinstance(each, End):
            seen.append((sorted(each.skipped.items()), each.form))
    return seen


BEGIN: Final = Begin(b"", 0, 0)


def test_who_changes_what_is_read_gives_it_another_name(tmp_path: Path) -> None:
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    write_tables(tmp_path)
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "rows.arrow"}]}')
    listed = [source.path.name for source in find([str(tmp_path)], "--shard").sources]
    assert listed == sorted(listed)
    found = [
        (path.name, path.name in listed, field, named, read(path, field, named=named))
        for path in sorted(tmp_path.iterdir())
        for field in ("text", "messages", "prompt+completion")
        for named in (True, False)
        if path.is_file() and path.name != "state.json"
    ]
    digest = hashlib.blake2b(repr(found).encode(), digest_size=16).hexdigest()
    assert {READING: digest} == PINNED
