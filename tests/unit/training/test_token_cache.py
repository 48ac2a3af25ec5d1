"""The cache of tokens: every text is tokenised once, whatever is killed."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.training.shards import Node, require_same, write_mixed
from xpeer.errors import ShardError
from xpeer.status import TextProgress
from xpeer.training import (
    formats,
    reading,
    token_cache,
    tokenising,
)
from xpeer.training.document import document_of
from xpeer.training.token_cache import TokenCache
from xpeer.training.tokenizer import ByteTokenizer


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
