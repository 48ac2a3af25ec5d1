"""Reads the text that a node trains on, divides it, and cuts it into records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch

from xpeer.config import Home, NodeConfig
from xpeer.errors import ShardError
from xpeer.manifest import Manifest
from xpeer.privacy.steps import Records
from xpeer.status import CorpusShare, ShardSummary
from xpeer.trainer.setup import TrainerSetup
from xpeer.training.document import HexIds, digest_of_names
from xpeer.training.documents import no_text
from xpeer.training.files import find
from xpeer.training.formats import texts
from xpeer.training.formats.rows import NO_COLUMN
from xpeer.training.held_out import HeldOut
from xpeer.training.kinds import kind_of
from xpeer.training.partition import choose, piece_characters, refuse_other
from xpeer.training.piece_table import PieceTable, first_of_each, split_pieces
from xpeer.training.reading import Recipe
from xpeer.training.record_view import MappedRecords
from xpeer.training.sources import Source
from xpeer.training.token_cache import TokenCache
from xpeer.training.token_file import BEGINS
from xpeer.training.tokenising import OnProgress, ignore, tokenise
from xpeer.training.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Text:
    """The text that a node trains on."""

    records: Records  # (n, T) int64
    owners: torch.Tensor  # (n,) int64: the number of each record's document
    documents: HexIds
    """Ids of the documents; for a piece, the id of the whole document."""
    held_out: Records  # (m, T) int64
    shard: ShardSummary
    share: CorpusShare | None
    """This node's part of a shared corpus; None = there is none."""
    tokens: int = 0
    """Tokens in `records`, without filling."""

    @property
    def num_owners(self) -> int:
        """Number of documents, or pieces of some, that have records."""
        return int((self.owners[1:] != self.owners[:-1]).sum()) + (len(self.owners) > 0)

    @property
    def warnings(self) -> list[str]:
        """What the operator should hear of: examples of which little or nothing is learnt."""
        told = []
        if self.shard.cut:
            told.append(
                f"{self.shard.cut:,} of {len(self.records):,} examples are longer than "
                f"optimiser.sequence_tokens = {self.records.shape[1]} and cut off, "
                f"{self.shard.unanswered:,} of them before their answer, so that nothing is learnt "
                "of these: shorten them, or found a swarm with longer records"
            )
        if self.shard.unpredicted:
            told.append(
                f"{self.shard.unpredicted:,} of {len(self.records):,} examples have an answer that "
                "makes no token, so that nothing is learnt of these: take them out, or correct them"
            )
        return told


def text_if_any(
    setup: TrainerSetup,
    manifest: Manifest,
    tokenizer: Tokenizer,
    home: Home,
    on_progress: OnProgress = ignore,
) -> tuple[Text, str]:
    """Read the text. If a home that has trained can't read it, return no text, and why.

    Raises:
        ShardError: there is no text, and this home has never trained or names no files.
    """
    try:
        text = text_of(setup, manifest, tokenizer, home.cache, on_progress, remember=True)
        return text, ""
    except ShardError as e:
        if not goes_on_without_text(setup.config, trained=setup.has_trained):
            raise
        empty = torch.empty((0, manifest.optimiser.sequence_tokens), dtype=torch.int64)
        nothing = HexIds(np.empty((0, 2), np.uint64))
        return Text(empty, empty[:, 0], nothing, empty, ShardSummary(), None), str(e)


def goes_on_without_text(config: NodeConfig, *, trained: bool) -> bool:
    """Whether a node whose text can't be read starts all the same, to give its model to others."""
    return trained and bool(config.data.corpus or config.data.shard)


def text_of(
    setup: TrainerSetup,
    manifest: Manifest,
    tokenizer: Tokenizer,
    cache: Path,
    on_progress: OnProgress = ignore,
    *,
    remember: bool = False,
) -> Text:
    """Read the shard, or this node's part of the corpus, unless the cache holds all of its tokens.

    Args:
        setup: names the files.
        manifest: of the swarm.
        tokenizer: of the swarm.
        cache: folder for tokens.
        on_progress: called now and then while text is tokenised.
        remember: whether the home is to note what is held out.

    Raises:
        ShardError: there is no text, or it can't be read.
    """
    data, shared = setup.config.data, manifest.shared_corpus
    patterns, setting = (data.corpus, "data.corpus") if shared else (data.shard, "data.shard")
    length = manifest.optimiser.sequence_tokens
    recipe = Recipe(tokenizer, data.text_field, piece_characters(manifest) if shared else 0)
    table, summary = read_table(patterns, setting, recipe, cache, on_progress)
    if shared:
        refuse_other(shared, digest_of_names(table.whole[table.flags & BEGINS != 0]))
    if shared:
        training, held_out = split_pieces(table, data.validation_share, data.split)
    else:
        memory = HeldOut(Home(Path(setup.home)), data.validation_share, data.split)
        training, held_out = memory.split(table)
        if remember:
            memory.remember(table, held_out)
    mine, share = table.select(training), None
    if shared:
        # after the split: no member trains on text that another one measures on
        names, characters = mine.id[:, 0].astype(np.uint64), int(mine.characters.sum())
        chosen, share = choose(names, characters, manifest, setup.members, setup.peer_id)
        mine = mine.select(chosen)
    records = MappedRecords(mine, length, examples=recipe.makes_examples)
    records.require_some()
    owners = records.owners()
    tokens = records.num_tokens()
    if share is not None:
        share = msgspec.structs.replace(share, tokens=tokens)
    return Text(
        records,
        owners,
        mine.wholes(),
        MappedRecords(table.select(held_out), length, examples=recipe.makes_examples),
        counted(summary, records),
        share,
        tokens,
    )


def counted(summary: ShardSummary, records: MappedRecords) -> ShardSummary:
    """Add what becomes of the documents as records."""
    cut, unanswered = records.cut_examples()
    return msgspec.structs.replace(
        summary,
        too_short=records.too_short(),
        cut=cut,
        unanswered=unanswered,
        unpredicted=records.unpredicted(),
    )


def read_table(
    patterns: Sequence[str],
    setting: str,
    recipe: Recipe,
    cache: Path,
    on_progress: OnProgress,
) -> tuple[PieceTable, ShardSummary]:
    """List the pieces of a shard, each document once; tokenise what the cache does not hold.

    Args:
        patterns: see `files.find`.
        setting: name of the setting, for errors.
        recipe: how text becomes tokens.
        cache: folder of this node.
        on_progress: called now and then while text is tokenised.

    Raises:
        ShardError: there is no text, or it can't be read.
    """
    tokens = TokenCache(cache, recipe)
    tokens.open()
    matched = find(patterns, setting, tokens.room)
    known = tokenise(matched.sources, recipe, tokens, on_progress)
    tokens.prune(known)
    everything = tokens.table(known)
    once = first_of_each(everything)
    table = everything if len(once) == len(everything) else everything.select(once)
    skipped, left_out, files = tokens.counts(known)
    documents = int((table.flags & BEGINS != 0).sum())
    summary = ShardSummary(
        files=files,
        documents=documents,
        characters=int(table.characters.sum()),
        repeated=int((everything.flags & BEGINS != 0).sum()) - documents,
        skipped=dict(skipped),
        left_out=dict(matched.left_out + left_out),
        outside=dict(matched.outside),
    )
    if not documents:
        if left_out[NO_COLUMN]:
            _name_columns(matched.sources, recipe.text_field)
        raise no_text(patterns, setting, summary)
    return table, summary


def _name_columns(sources: Sequence[Source], field: str) -> None:
    """Have the first table that lacks the column say which columns it has.

    Raises:
        ShardError: it does.
    """
    for source in sources:
        if kind_of(source.path) in (".csv", ".tsv"):
            next(texts(source.path, field, Counter(), named=True), None)
