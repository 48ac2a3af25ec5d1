"""A node whose text is read again and again, and what its records have to be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch

from tests.in_memory import cut_owned, load_documents, split
from tests.unit.training.test_tokens import ENGLISH
from xpeer.config import Data, Home, NodeConfig
from xpeer.identity import blake2b
from xpeer.manifest import End, Manifest, Optimiser, PublicText, Tokenizer
from xpeer.manifest.model import Model
from xpeer.status import TextProgress
from xpeer.trainer.setup import TrainerSetup
from xpeer.trainer.text import Text, text_of
from xpeer.training import (
    tokenising,
)
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
