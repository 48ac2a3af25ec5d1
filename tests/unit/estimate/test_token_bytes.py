"""How many bytes the tokens of a text take: as estimated, and as written."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.unit.training.shards import Node
from tests.unit.training.test_examples import chatting
from tests.unit.training.test_tokens import ENGLISH
from xpeer.estimate.token_bytes import bytes_of_tokens
from xpeer.manifest import Tokenizer
from xpeer.manifest.model import Model
from xpeer.training.tokenizer import HuggingFaceTokenizer

PARTS = [ENGLISH[at : at + 2000] for at in range(0, len(ENGLISH), 2000)]
CHATS = [
    [{"role": "user", "content": part[:400]}, {"role": "assistant", "content": part[400:]}]
    for part in PARTS
]


def _plain(folder: Path) -> None:
    (folder / "a.txt").write_text("\n".join(PARTS))


def _rows(folder: Path) -> None:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(_lines(text=PARTS)))


def _chats(folder: Path) -> None:
    (folder / "a.jsonl").write_bytes(_lines(messages=CHATS))


def _packed_chats(folder: Path) -> None:
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(_lines(messages=CHATS)))


def _table(folder: Path) -> None:
    columns = {"text": PARTS, "unread": [part * 9 for part in PARTS]}
    parquet.write_table(pa.table(columns), folder / "a.parquet", compression="zstd")


def _lines(**columns: list[Any]) -> bytes:
    ((name, values),) = columns.items()
    return "\n".join(json.dumps({name: value}) for value in values).encode()


KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "plain": (_plain, "text"),
    "packed": (_rows, "text"),
    "parquet": (_table, "text"),
    "chats": (_chats, "messages"),
    "packed chats": (_packed_chats, "messages"),
}


@pytest.mark.parametrize("vocabulary", [None, 30_000, 40_000, 70_000])
@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_is_of_the_size_that_is_written(
    tmp_path: Path, kind: str, vocabulary: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(tmp_path)
    for file in node.shard.iterdir():
        file.unlink()
    make, field = KINDS[kind]
    make(node.shard)
    node.with_data(text_field=field)
    node.with_length(4000)
    manifest = node.manifest
    if vocabulary is None:
        if field == "messages":
            pytest.skip("bytes have no template for chats")
        expected = manifest
    else:
        node.tokenizer = chatting(tmp_path)
        monkeypatch.setattr(HuggingFaceTokenizer, "vocab_size", vocabulary)
        model = Model({"vocab_size": vocabulary}, num_params=1, initial_digest="")
        changes = {"tokenizer": Tokenizer("huggingface", "00"), "model": model}
        expected = msgspec.structs.replace(manifest, **changes)
    node.read()
    written = sum(file.stat().st_size for file in node.files)
    estimated = bytes_of_tokens(expected, node.setup.config, lambda path: path.stat().st_size)
    assert 0.5 < estimated / written < 2, (estimated, written)


def test_a_table_that_cant_be_read_is_estimated_by_its_size(tmp_path: Path) -> None:
    node = Node(tmp_path)
    (node.shard / "x.parquet").write_bytes(b"PAR1 damaged")
    assert bytes_of_tokens(node.manifest, node.setup.config, lambda _path: 100) == 2 * 1600
