"""Reads the text that a node trains on, divides it, and cuts it into records."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import torch

from xpeer.config import Home
from xpeer.errors import ShardError
from xpeer.manifest import Manifest
from xpeer.status import CorpusShare, ShardSummary
from xpeer.trainer.setup import TrainerSetup
from xpeer.training.documents import read_shard
from xpeer.training.partition import divide, refuse_other
from xpeer.training.records import load_owned_records, load_records, split
from xpeer.training.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Text:
    """The text that a node trains on."""

    records: torch.Tensor  # (n, T) int64
    owners: torch.Tensor  # (n,) int64: the number of each record's document
    documents: list[str]
    """Ids of the documents; for a piece, the id of the whole document."""
    held_out: torch.Tensor  # (m, T) int64
    shard: ShardSummary
    share: CorpusShare | None
    """This node's part of a shared corpus; None = there is none."""


def text_if_any(
    setup: TrainerSetup, manifest: Manifest, tokenizer: Tokenizer, home: Home
) -> tuple[Text, str]:
    """Read the text. If a home that has trained can't read it, return no text, and why.

    Raises:
        ShardError: there is no text, and this home has never trained or names no files.
    """
    try:
        return text_of(setup, manifest, tokenizer, home), ""
    except ShardError as e:
        data = setup.config.data
        if not (setup.has_trained and (data.corpus or data.shard)):
            raise
        empty = torch.empty((0, manifest.optimiser.sequence_tokens), dtype=torch.int64)
        return Text(empty, empty[:, 0], [], empty, ShardSummary(), None), str(e)


def text_of(setup: TrainerSetup, manifest: Manifest, tokenizer: Tokenizer, home: Home) -> Text:
    """Read the shard, or this node's part of the corpus.

    Args:
        setup: names the files.
        manifest: of the swarm.
        tokenizer: of the swarm.
        home: has the cache.

    Raises:
        ShardError: there is no text, or it can't be read.
    """
    data, shared = setup.config.data, manifest.shared_corpus
    patterns, setting = (data.corpus, "data.corpus") if shared else (data.shard, "data.shard")
    shard = read_shard(patterns, data.text_field, setting)
    documents = shard.documents
    if shared:
        refuse_other(shared, documents)
    training, held_out = split(documents, data.validation_share, data.split)
    share = None
    if shared:
        # after the split: no member trains on text that another one measures on
        training, share = divide(training, manifest, setup.members, setup.peer_id)
    length = manifest.optimiser.sequence_tokens
    records, owners = load_owned_records(training, tokenizer, length, home.cache)
    if share is not None:
        share = msgspec.structs.replace(share, tokens=int((records >= 0).sum()))
    try:
        validation = load_records(held_out, tokenizer, length, home.cache)
    except ShardError:  # a single document, or too little held out for one record
        validation = records[:0]
    ids = [document.whole or document.id for document in training]
    too_short = len(training) - len(set(owners.tolist()))
    summary = msgspec.structs.replace(shard.summary, too_short=too_short)
    return Text(records, owners, ids, validation, summary, share)
