"""The same records as ever, whatever is read in blocks and kept in files."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import msgspec
import pytest
import torch

from tests.fixtures.homes import STARTED, moved
from tests.in_memory import cut_owned, load_documents, split
from tests.unit.training.shards import Node, require_same, write_mixed
from tests.unit.training.test_tokens import ENGLISH, byte_level
from xpeer.errors import ShardError
from xpeer.manifest import SharedCorpus
from xpeer.manifest.signed import SignedManifest
from xpeer.training import (
    partition,
)
from xpeer.training.formats import long, plain


@pytest.mark.parametrize("by", ["document", "file"])
@pytest.mark.parametrize("length", [16, 33, 512])
def test_records_split_and_documents_are_what_they_were(
    node: Node, small: None, by: str, length: int
) -> None:
    write_mixed(node.shard)
    node.with_data(split=by, validation_share=0.3)
    node.with_length(length)
    text = require_same(node)
    assert len(node.files) > 10
    assert text.shard.skipped == {"empty": 1, "null": 1, "no field": 1}
    assert text.shard.repeated == 2
    assert require_same(node).shard == text.shard


@pytest.mark.parametrize("shared", [False, True])
def test_a_text_that_does_not_fit_into_memory_is_the_same(
    node: Node, small: None, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mixed(node.shard)
    (node.shard / "packed.txt.gz").write_bytes(gzip.compress(("\ufeff" + ENGLISH[7:9000]).encode()))
    (node.shard / "accents.txt").write_text("e\u0301 \u4e2d\u6587\u3002 " * 900)
    before = node.read() if not shared else None
    if shared:
        corpus = SharedCorpus("books")
        node.manifest = msgspec.structs.replace(node.manifest, shared_corpus=corpus)
        node.with_data(corpus=[str(node.shard)], shard=[])
        node.setup = msgspec.structs.replace(node.setup, members={"peer0": 1.0})
        before = node.read()
    shutil.rmtree(node.home.cache)
    monkeypatch.setattr(plain, "LONG", 2000)
    monkeypatch.setattr(long, "BLOCK", 777)
    after = node.read()
    assert before is not None
    assert torch.equal(before.records[:], after.records[:])
    assert torch.equal(before.held_out[:], after.held_out[:])
    assert (before.documents, before.shard) == (after.documents, after.shard)


def test_a_long_text_is_checked_as_a_short_one(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "LONG", 2000)
    path = node.shard / "0.txt"
    row = json.dumps({"text": "words " * 99}) + "\n"
    for data, problem in (
        (b"x" * 5000 + b"\xff", "byte 5000 is not UTF-8"),
        (("words " * 900).encode("utf-16-le"), "characters are NUL"),
        (b"<html>" + b"words " * 900, "is mark-up"),
        ((row * 30).encode(), "is JSON"),
        (json.dumps([row] * 300).encode(), ""),
        (json.dumps([{"a": row}] * 300).encode(), "is JSON"),
        (("[1] " + "words " * 900).encode(), ""),
    ):
        path.write_bytes(data)
        node.with_data(shard=[str(path), str(node.shard / "1.txt"), str(node.shard / "2.txt")])
        if problem:
            with pytest.raises(ShardError, match=problem):
                node.read()
        else:
            assert node.read().shard.documents == 3


def test_a_long_text_that_changes_while_it_is_read_is_an_error(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = node.shard / "0.txt"
    path.write_text("words " * 900)
    named = long.long_text(path, path.stat().st_size)
    path.write_text("other " * 900)
    with pytest.raises(ShardError, match="changed while it was read"):
        list(named.blocks())


def test_the_same_with_a_tokenizer_of_a_model(node: Node, small: None, tmp_path: Path) -> None:
    write_mixed(node.shard)
    node.tokenizer = byte_level(tmp_path)
    require_same(node)


@pytest.mark.parametrize("name", STARTED)
def test_old_homes_have_the_same_records(
    name: str, tmp_path: Path, register_of_the_test: Path
) -> None:
    old = moved(name, tmp_path / "old", register_of_the_test)
    node = Node(tmp_path)
    node.home, node.manifest = old.home, SignedManifest.load(old.home.manifest).open()
    node.with_data(shard=[str(old.text)])
    require_same(node)


def test_a_shared_corpus_is_divided_as_before(tmp_path: Path, small: None) -> None:
    node = Node(tmp_path)
    corpus = SharedCorpus("books")
    node.manifest = msgspec.structs.replace(node.manifest, shared_corpus=corpus)
    write_mixed(node.shard)
    node.with_length(16)
    node.with_data(corpus=[str(node.shard)], shard=[])
    speeds = {"a": 1.0, "b": 2.0, "peer0": 1.5}
    everything = load_documents([str(node.shard)])
    training, _ = split(everything, node.setup.config.data.validation_share)
    for me in speeds:
        node.setup = msgspec.structs.replace(node.setup, members=speeds, peer_id=me)
        mine, share = partition.divide(training, node.manifest, speeds, me)
        records, owners = cut_owned(mine, node.tokenizer, 16)
        text = node.read()
        assert torch.equal(text.records[:], records)
        assert torch.equal(text.owners, owners)
        assert list(text.documents) == [piece.whole or piece.id for piece in mine]
        assert text.share == msgspec.structs.replace(share, tokens=int((records >= 0).sum()))


def test_ids_beyond_the_table_are_refused(node: Node) -> None:
    records = node.read().records
    for index in (torch.tensor([len(records)]), torch.tensor([-1]), torch.tensor([[0]])):
        with pytest.raises(IndexError):
            records[index]
    assert records[torch.tensor([], dtype=torch.int64)].shape == (0, records.shape[1])
