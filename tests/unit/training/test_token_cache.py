"""The cache of tokens: the same records as ever, every text tokenised once, whatever is killed."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests.fixtures.homes import STARTED, moved
from tests.in_memory import cut_owned, load_documents, split
from tests.unit.training.test_tokens import ENGLISH, byte_level
from xpeer.config import Data, Home, NodeConfig
from xpeer.errors import ShardError
from xpeer.identity import blake2b
from xpeer.manifest import End, Manifest, Optimiser, PublicText, SharedCorpus, Tokenizer
from xpeer.manifest.model import Model
from xpeer.manifest.signed import SignedManifest
from xpeer.status import TextProgress
from xpeer.trainer.setup import TrainerSetup
from xpeer.trainer.text import Text, text_of
from xpeer.training import (
    document,
    formats,
    listing,
    partition,
    reading,
    record_view,
    room,
    token_cache,
    tokenising,
    tokens,
)
from xpeer.training.document import document_of
from xpeer.training.formats import long, plain
from xpeer.training.token_cache import TokenCache
from xpeer.training.tokenizer import ByteTokenizer

SENTENCE = "the quick brown fox jumps over the lazy dog, and somebody saw it on day {day}. "


class Node:
    """A home with a shard, read again and again. There is no model."""

    def __init__(self, folder: Path) -> None:
        self.shard = folder / "shard"
        self.shard.mkdir()
        for day in range(12):
            (self.shard / f"{day}.txt").write_text(SENTENCE.format(day=day) * 4)
        self.home = Home(folder / "home")
        self.setup = TrainerSetup(
            manifest_path="",
            swarm_id="",
            home=str(self.home.path),
            peer_id="peer0",
            config=NodeConfig(data=Data(shard=[str(self.shard)])),
        )
        self.manifest = Manifest(
            name="test",
            created_unix_s=0,
            model=Model({}, num_params=1000, initial_digest=""),
            tokenizer=Tokenizer(),
            optimiser=Optimiser(sequence_tokens=32),
            public_text=PublicText(blake2b(b"").hex(), ""),
            end=End(steps=1),
        )
        self.tokenizer: Any = ByteTokenizer()

    def read(self, progress: Callable[[TextProgress], None] = tokenising.ignore) -> Text:
        return text_of(self.setup, self.manifest, self.tokenizer, self.home.cache, progress)

    @property
    def files(self) -> list[Path]:
        return sorted((self.home.cache / "tokens").rglob("*.tokens"))

    def with_data(self, **data: Any) -> None:
        config = self.setup.config
        changed = msgspec.structs.replace(config.data, **data)
        config = msgspec.structs.replace(config, data=changed)
        self.setup = msgspec.structs.replace(self.setup, config=config)

    def with_length(self, tokens: int) -> None:
        optimiser = msgspec.structs.replace(self.manifest.optimiser, sequence_tokens=tokens)
        self.manifest = msgspec.structs.replace(self.manifest, optimiser=optimiser)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def as_before(node: Node) -> tuple[torch.Tensor, torch.Tensor, list[str], torch.Tensor]:
    """What the functions that hold everything in memory make of the same text."""
    data, length = node.setup.config.data, node.manifest.optimiser.sequence_tokens
    training, held_out = split(
        load_documents(data.shard, data.text_field), data.validation_share, data.split
    )
    records, owners = cut_owned(training, node.tokenizer, length)
    ids = [document.id for document in training]
    return records, owners, ids, cut_owned(held_out, node.tokenizer, length)[0]


def require_same(node: Node) -> Text:
    text = node.read()
    records, owners, ids, held_out = as_before(node)
    assert text.records.shape == records.shape
    assert torch.equal(text.records[:], records)
    assert torch.equal(text.owners, owners)
    assert list(text.documents) == ids
    assert torch.equal(text.held_out[:], held_out)
    assert text.tokens == int((records >= 0).sum())
    some = torch.randperm(len(records), generator=torch.Generator().manual_seed(3))[:20]
    assert torch.equal(text.records[some], records[some])
    return text


def write_mixed(shard: Path) -> None:
    """Text of all lengths, repeated, empty, in files of several documents."""
    lines = [ENGLISH[at : at + size] for at, size in ((0, 40), (90, 3), (500, 4000), (0, 40))]
    rows = [{"text": line} for line in lines] + [{"text": " "}, {"text": None}, {"other": 1}]
    (shard / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (shard / "long.txt").write_text(ENGLISH[:30_000])
    (shard / "same.md").write_text(lines[2])
    (shard / "z.txt").write_text("the last of all, a short one")


SMALL = {"FILE_TOKENS": 700, "BATCH_CHARACTERS": 900, "BATCH_EVENTS": 5, "_ROWS": 3}
BLOCKS = {
    token_cache: {"_BLOCK": 3},
    listing: {"_BLOCK": 5},
    document: {"_BLOCK": 3},
    record_view: {"_BLOCK": 7, "_PIECES": 4},
    room: {"_SMALL": 16, "_WAITING": 16},
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many files of tokens, many batches, many parts, many blocks; all arrays are in files."""
    for module, values in {tokenising: SMALL, **BLOCKS}.items():
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(tokens, "PIECE", 600)


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


def test_another_length_of_records_needs_no_new_tokens(node: Node, unread: Unread) -> None:
    require_same(node)
    with unread:
        node.with_length(48)
        text = node.read()
    assert text.records.shape[1] == 48
    require_same(node)


class Unread:
    """Fails the test if a text file is opened in its block."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch

    def __enter__(self) -> None:
        def fail(*_: object, **__: object) -> Iterator[str]:
            raise AssertionError("a text file was opened")

        self._patch.setattr(reading, "texts", fail)

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> Unread:
    return Unread(monkeypatch)


def test_a_second_start_opens_no_text(node: Node, unread: Unread) -> None:
    write_mixed(node.shard)
    first = node.read()
    with unread:
        again = node.read()
    assert torch.equal(first.records[:], again.records[:])
    assert (first.documents, first.shard) == (again.documents, again.shard)


def test_only_what_changed_is_read_again(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.read()
    opened: list[str] = []
    texts = formats.texts

    def watched(path: Path, *args: Any, **kwargs: Any) -> Iterator[Any]:
        opened.append(path.name)
        return texts(path, *args, **kwargs)

    monkeypatch.setattr(reading, "texts", watched)
    (node.shard / "3.txt").write_text("another text, which is long enough for a record of its own")
    (node.shard / "4.txt").unlink()
    os.utime(node.shard / "5.txt", ns=(1, 1))
    require_same(node)
    assert opened == ["3.txt", "5.txt"]


def test_a_killed_start_goes_on_where_it_was(
    node: Node, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mixed(node.shard)
    encoded: list[str] = []

    class Counting(ByteTokenizer):
        left = 10

        def encode_batch(self, texts: list[str]) -> list[Any]:
            if Counting.left <= 0:
                raise KeyboardInterrupt
            Counting.left -= 1
            encoded.extend(texts)
            return super().encode_batch(texts)

    node.tokenizer = Counting()
    for _ in range(12):  # killed again and again, in the middle of documents, too
        Counting.left = 10
        try:
            node.read()
        except KeyboardInterrupt:
            continue
        break
    else:
        raise AssertionError("it never got on")
    again = sum(map(len, encoded))
    node.tokenizer = ByteTokenizer()
    text = require_same(node)
    # each kill costs no more than a file of tokens and the batches in flight
    assert again <= text.shard.characters + 4000 + 12 * (700 + 5 * 900)
    assert not list(node.files[0].parent.glob(".writing-*.tokens"))


def test_the_cache_is_private(node: Node) -> None:
    node.home.cache.mkdir(mode=0o755, parents=True)
    node.read()
    inside = list((node.home.cache / "tokens").rglob("*"))
    assert {stat.S_IMODE(p.stat().st_mode) for p in inside if p.is_dir()} == {0o700}
    assert {stat.S_IMODE(p.stat().st_mode) for p in inside if p.is_file()} == {0o600}


@pytest.mark.parametrize("place", ["tokens", "tables", "footer", "end", "empty"])
def test_damaged_tokens_are_made_again(node: Node, small: None, place: str) -> None:
    write_mixed(node.shard)
    node.read()
    path = node.files[3]
    data = bytearray(path.read_bytes())
    at = {"tokens": 2, "tables": len(data) - 90, "footer": len(data) - 60}.get(place)
    if at is not None:
        data[at] ^= 1
    path.write_bytes({"end": bytes(data[:-7]), "empty": b""}.get(place, bytes(data)))
    require_same(node)


def test_tokens_are_of_the_smallest_type(tmp_path: Path) -> None:
    class Large(ByteTokenizer):
        name = "large"
        vocab_size = 1 << 17

    recipes = [reading.Recipe(tokenizer) for tokenizer in (ByteTokenizer(), Large())]
    assert [TokenCache(tmp_path, recipe).dtype.itemsize for recipe in recipes] == [2, 4]


def test_a_text_that_was_left_out_is_an_error_once_it_is_named(node: Node) -> None:
    (node.shard / "page.txt").write_text("<html><body>words</body></html>")
    assert node.read().shard.left_out == {"mark-up": 1}
    assert node.read().shard.left_out == {"mark-up": 1}
    node.with_data(shard=[str(node.shard), str(node.shard / "page.txt")])
    with pytest.raises(ShardError, match="is mark-up"):
        node.read()


def test_what_nobody_needs_is_removed(node: Node, small: None) -> None:
    write_mixed(node.shard)
    old = node.home.cache / "records-0123.safetensors"
    node.home.cache.mkdir(parents=True)
    old.write_bytes(b"tokens of an earlier version")
    node.read()
    assert not old.exists()
    before = set(node.files)
    for name in ("long.txt", "rows.jsonl"):
        (node.shard / name).unlink()
    require_same(node)
    assert set(node.files) < before
    for number in range(token_cache.KEPT_RECIPES + 2):
        node.with_data(text_field=f"field{number}")
        node.read()
    assert len(list((node.home.cache / "tokens").iterdir())) == token_cache.KEPT_RECIPES


def test_a_folder_that_can_not_be_used_is_an_error(node: Node) -> None:
    node.home.cache.mkdir(parents=True)
    (node.home.cache / "tokens").write_text("no folder")
    with pytest.raises(ShardError, match=r"tokens of the text can't be kept in .*tokens"):
        node.read()


def test_documents_are_those_whose_tokens_are_read(node: Node) -> None:
    """A file that changes after it was read: the account gets the ids of what is trained on."""
    path = node.shard / "0.txt"
    read = document_of(path.read_text(), "").id
    with_times = path.stat()
    node.read()
    path.write_text("x" * with_times.st_size)  # the same size, and soon the same times
    os.utime(path, ns=(with_times.st_atime_ns, with_times.st_mtime_ns))
    text = require_same(node)  # ctime tells
    assert read not in text.documents


def test_progress_is_reported(node: Node, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mixed(node.shard)
    monkeypatch.setattr(tokenising, "_REPORT_EVERY_S", 0.0)
    reports: list[TextProgress] = []
    text = node.read(reports.append)
    total = sum(path.stat().st_size for path in node.shard.iterdir())
    assert [each.bytes_total for each in reports] == [total] * len(reports)
    done = [each.bytes_read for each in reports]
    assert done == sorted(done)
    assert len(set(done)) > 5
    last = reports[-1]
    assert last.bytes_read == total
    assert last.eta_s == 0
    assert last.documents == text.shard.documents + text.shard.repeated
    assert last.tokens >= text.tokens


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
