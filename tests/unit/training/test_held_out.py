"""What was held out is never trained on, whatever is added to the text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import msgspec
import pytest

from tests.unit.training.shards import Node
from xpeer.errors import ShardError
from xpeer.manifest import SharedCorpus
from xpeer.trainer.text import Text, text_of
from xpeer.training.document import document_of
from xpeer.training.tokenising import ignore


class Remembering(Node):
    """Reads its shard as a trainer does."""

    def __init__(self, folder: Path, by: str = "file", share: float = 0.3) -> None:
        super().__init__(folder)
        self.home.path.mkdir()
        shutil.rmtree(self.shard)
        self.shard.mkdir()
        self.with_data(split=by, validation_share=share)

    def read_on(self) -> Text:
        return text_of(
            self.setup, self.manifest, self.tokenizer, self.home.cache, ignore, remember=True
        )

    def trained_on(self) -> set[str]:
        return set(self.read_on().documents)

    def held_out(self, everything: set[str]) -> set[str]:
        return everything - self.trained_on()

    def rows(self, name: str, numbers: range, *, more: bool = False) -> set[str]:
        texts = [f"{name}: a row with the number {n}, of some length" for n in numbers]
        with (self.shard / name).open("a" if more else "w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        return {document_of(text, "").id for text in texts}


def files(node: Remembering, count: int = 12) -> dict[str, set[str]]:
    return {name: node.rows(name, range(4)) for name in (f"{n}.jsonl" for n in range(count))}


def split_of(node: Remembering, by_file: dict[str, set[str]]) -> set[str]:
    """Names of the files that are held out; none is so in part."""
    trained = node.trained_on()
    assert all(ids <= trained or not ids & trained for ids in by_file.values())
    return {name for name, ids in by_file.items() if not ids & trained}


def test_a_file_that_is_appended_to_stays_on_its_side(tmp_path: Path) -> None:
    """Its key was the digest of all its documents: with each row the file was drawn anew."""
    node = Remembering(tmp_path)
    by_file = files(node)
    before = split_of(node, by_file)
    assert 0 < len(before) < 12
    for round_ in range(5):
        for name in by_file:
            by_file[name] |= node.rows(name, range(9 + round_, 10 + round_), more=True)
        assert split_of(node, by_file) == before


def test_the_rows_of_a_file_that_was_held_out_stay_so(tmp_path: Path) -> None:
    """Even if its first row is gone, or another file has them, too."""
    node = Remembering(tmp_path)
    by_file = files(node)
    name = min(split_of(node, by_file))
    old = (node.shard / name).read_text().splitlines()
    (node.shard / name).write_text("\n".join(old[1:]))
    assert not by_file[name] & node.trained_on()
    others = {each: ids for each, ids in by_file.items() if each != name}
    before = split_of(node, others)
    (node.shard / name).unlink()
    target = max(set(others) - before)
    with (node.shard / target).open("a") as file:
        file.write("\n".join(old) + "\n")
    assert not by_file[name] & node.trained_on()
    assert split_of(node, others) == before


def test_the_one_document_that_a_small_shard_holds_out_stays_so(tmp_path: Path) -> None:
    """With each document that came, another one could have the smallest number."""
    node = Remembering(tmp_path, "document", 1e-6)
    everything = node.rows("a.jsonl", range(3))
    (first,) = node.held_out(everything)
    for n in range(3, 40):
        everything |= node.rows("a.jsonl", range(n, n + 1), more=True)
    assert node.held_out(everything) == {first}


def test_text_that_was_held_out_is_not_trained_on_if_it_is_all_there_is(tmp_path: Path) -> None:
    node = Remembering(tmp_path)
    by_file = files(node)
    before = split_of(node, by_file)
    for name in set(by_file) - before:
        (node.shard / name).unlink()
    with pytest.raises(ShardError, match=r"all \d+ documents were held out before"):
        node.read_on()


def test_another_share_is_another_choice(tmp_path: Path) -> None:
    node = Remembering(tmp_path, "document", 0.5)
    everything = node.rows("a.jsonl", range(40))
    many = node.held_out(everything)
    node.with_data(validation_share=0.1)
    assert node.held_out(everything) < many


@pytest.mark.parametrize("trained", [False, True])
def test_a_home_that_trained_with_an_earlier_version_keeps_its_files(
    tmp_path: Path, trained: bool
) -> None:
    node = Remembering(tmp_path)
    by_file = files(node, 40)
    everything = set().union(*by_file.values())
    shared = msgspec.structs.replace(node.manifest, shared_corpus=SharedCorpus("books"))
    setup = msgspec.structs.replace(
        node.setup,
        config=msgspec.structs.replace(
            node.setup.config,
            data=msgspec.structs.replace(node.setup.config.data, corpus=[str(node.shard)]),
        ),
        members={"peer0": 1.0},
    )
    earlier = set(text_of(setup, shared, node.tokenizer, node.home.cache).documents)
    if trained:
        node.home.checkpoints.mkdir()
        (node.home.checkpoints / "ckpt-000000000001.safetensors").touch()
    before = node.trained_on()
    assert (before == earlier) == trained
    shutil.rmtree(node.home.checkpoints, ignore_errors=True)
    assert node.trained_on() == before  # it is remembered
    more = node.rows("0.jsonl", range(9, 12), more=True)
    assert everything - before <= (everything | more) - node.trained_on()


def test_files_of_a_home_that_trained_with_an_earlier_version_are_not_drawn_anew(
    tmp_path: Path,
) -> None:
    """Its files were known by all of their documents, even after their sides were written down."""
    node = Remembering(tmp_path)
    by_file = files(node, 40)
    node.home.checkpoints.mkdir()
    (node.home.checkpoints / "ckpt-000000000001.safetensors").touch()
    before = split_of(node, by_file)
    assert 0 < len(before) < 40
    for round_ in range(3):
        for name in by_file:
            by_file[name] |= node.rows(name, range(9 + round_, 10 + round_), more=True)
        assert split_of(node, by_file) == before
    new = {name: node.rows(name, range(4)) for name in (f"new{n}.jsonl" for n in range(40))}
    drawn = split_of(node, by_file | new)
    assert drawn & set(by_file) == before
    assert 0 < len(drawn & set(new)) < 40
    for name in new:
        new[name] |= node.rows(name, range(9, 12), more=True)
    assert split_of(node, by_file | new) == drawn


def test_sides_that_were_written_down_without_the_files_to_train_on(tmp_path: Path) -> None:
    """The next start adds them."""
    node = Remembering(tmp_path)
    by_file = files(node, 40)
    node.home.checkpoints.mkdir()
    (node.home.checkpoints / "ckpt-000000000001.safetensors").touch()
    before = split_of(node, by_file)
    line, _, ids = node.home.held_out.read_bytes().partition(b"\n")
    settings = json.loads(line)
    count = settings.pop("trained")
    assert count == 40 - len(before)
    node.home.held_out.write_bytes(json.dumps(settings).encode() + b"\n" + ids[: -16 * count])
    assert split_of(node, by_file) == before
    assert json.loads(node.home.held_out.read_bytes().partition(b"\n")[0])["trained"] == count


def test_a_damaged_memory_is_a_fault_of_the_text(tmp_path: Path) -> None:
    node = Remembering(tmp_path)
    files(node)
    node.read_on()
    node.home.held_out.write_bytes(node.home.held_out.read_bytes()[:-3])
    with pytest.raises(ShardError, match="held-out is damaged"):
        node.read_on()


def test_whoever_only_looks_writes_nothing(tmp_path: Path) -> None:
    node = Remembering(tmp_path)
    files(node)
    node.read()
    assert not node.home.held_out.exists()
