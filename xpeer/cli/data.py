"""`xpeer data`: what a shard holds, counted as the trainer does it.

No text is printed, unless the operator asks for some records.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
from msgspec import Struct

from xpeer.cli.common import (
    GivenPath,
    GivenText,
    Whole,
    echo,
    echo_json,
    ended_by_signals,
    home_option,
    json_option,
    load_config,
    say,
)
from xpeer.cli.naming import naming
from xpeer.config import Data, Home
from xpeer.folders import folder_named
from xpeer.leaves import Local, Parts, seen_by
from xpeer.manifest import Manifest, Optimiser
from xpeer.paths import checked
from xpeer.source import has_tokenizer
from xpeer.status import ShardSummary

if TYPE_CHECKING:
    from xpeer.training.piece_table import Indices, PieceTable
    from xpeer.training.reading import Recipe
    from xpeer.training.tokenizer import Tokenizer

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
_NAMES = {"0": "least", "0.5": "median", "1": "most"}
_MARKS = ("\u27e6", "\u27e7")
"""Brackets around what is predicted."""


@seen_by("node", "printed by xpeer data inspect")
class Inspection(Struct, frozen=True, kw_only=True):
    """What a shard holds."""

    shard: Parts[ShardSummary]
    digest: Local[str]
    """BLAKE2b-256 of the documents' ids; their order does not matter."""
    documents: Local[int]
    """Documents to train on."""
    documents_held_out: Local[int]
    records: Local[int]
    records_held_out: Local[int]
    sequence_tokens: Local[int]
    tokens: Local[int]
    """Tokens in the records to train on."""
    tokens_dropped: Local[int]
    """Tokens at the ends of documents, or of examples, that make no record."""
    document_tokens: Local[dict[str, int]]
    """Quantiles of the documents' lengths in tokens."""
    shown: Local[list[str]] = []
    """The first records to train on, if they were asked for: text, with special tokens by name,
    and what is predicted between brackets."""


@click.group()
def data() -> None:
    """Count what the text to train on holds."""


@data.command("inspect")
@home_option
@json_option
@click.option(
    "--shard",
    multiple=True,
    type=GivenText(),
    metavar="PATH",
    help="Files, folders or globs. Default: data.corpus, or else data.shard.",
)
@click.option(
    "--text-field",
    type=GivenText(checked),
    metavar="FIELD",
    help="Field of a row that holds its text. Default: data.text_field.",
)
@click.option(
    "--tokenizer",
    type=GivenPath("folder", "tokenizer"),
    help="Folder of a Hugging Face tokenizer. Default: as for `xpeer start`, or else bytes.",
)
@click.option(
    "--sequence-tokens",
    type=Whole(8, 1 << 20),
    help="Tokens of a training sequence. Default: as in the home's manifest, or else 128.",
)
@click.option(
    "--show",
    type=Whole(0, 10_000),
    default=0,
    metavar="N",
    help="Also print the first N records to train on: private text.",
)
def inspect(
    home: Home,
    as_json: bool,
    shard: tuple[str, ...],
    text_field: str | None,
    tokenizer: Path | None,
    sequence_tokens: int | None,
    show: int,
) -> None:
    """Count documents, records and tokens, and say what is left out and why."""
    given = {
        "data.tokenizer": "--tokenizer" if tokenizer is not None else "",
        "data.text_field": "--text-field" if text_field is not None else "",
    }
    with naming(given):
        inspection = _inspect(home, shard, text_field, tokenizer, sequence_tokens, show)
    if as_json:
        echo_json(inspection)
        return
    for line in _lines(inspection):
        echo(line)


def _inspect(
    home: Home,
    shard: tuple[str, ...],
    text_field: str | None,
    tokenizer: Path | None,
    sequence_tokens: int | None,
    show: int,
) -> Inspection:
    from xpeer.training.partition import piece_characters  # noqa: PLC0415 - slow
    from xpeer.training.reading import Recipe  # noqa: PLC0415

    settings = load_config(home).data
    manifest = _manifest(home)
    is_divided = manifest is not None and manifest.shared_corpus is not None and not shard
    recipe = Recipe(
        _tokenizer(manifest, settings, tokenizer),
        text_field or settings.text_field,
        piece_characters(manifest) if manifest is not None and is_divided else 0,
    )
    patterns = shard or tuple(settings.corpus or settings.shard)
    setting = "--shard" if shard else "data.corpus" if settings.corpus else "data.shard"
    length = sequence_tokens or (manifest.optimiser if manifest else Optimiser()).sequence_tokens
    from xpeer.trainer.text import read_table  # noqa: PLC0415 - torch
    from xpeer.training.held_out import HeldOut  # noqa: PLC0415
    from xpeer.training.piece_table import split_pieces  # noqa: PLC0415
    from xpeer.training.token_cache import lent  # noqa: PLC0415
    from xpeer.training.tokenising import told  # noqa: PLC0415

    with ended_by_signals(), lent(home.cache) as cache:
        table, summary = read_table(patterns, setting, recipe, cache, told(say))
        if is_divided:
            parts = split_pieces(table, settings.validation_share, settings.split)
        else:
            parts = HeldOut(home, settings.validation_share, settings.split).split(table)
        return _inspected(table, summary, length, recipe, parts, show)


def _manifest(home: Home) -> Manifest | None:
    """The manifest of the home's swarm; None = it has none yet."""
    from xpeer.manifest.signed import SignedManifest  # noqa: PLC0415

    return SignedManifest.load(home.manifest).open() if home.manifest.exists() else None


def _tokenizer(manifest: Manifest | None, settings: Data, folder: Path | None) -> Tokenizer:
    """The tokenizer that the trainer would load; the option wins."""
    from xpeer.training.tokenizer import (  # noqa: PLC0415 - slow
        ByteTokenizer,
        HuggingFaceTokenizer,
        load_tokenizer,
    )

    if folder is None and manifest is not None:
        return load_tokenizer(
            manifest.tokenizer, settings.tokenizer, base_model=settings.base_model
        )
    if folder is None and settings.tokenizer:
        folder = folder_named("data.tokenizer", settings.tokenizer, "tokenizer")
    elif folder is None and settings.base_model:
        beside = folder_named("data.base_model", settings.base_model, "model")
        folder = beside if has_tokenizer(beside, "data.base_model") else None
    return HuggingFaceTokenizer(folder) if folder else ByteTokenizer()


def _inspected(
    table: PieceTable,
    summary: ShardSummary,
    length: int,
    recipe: Recipe,
    parts: tuple[Indices, Indices],
    show: int,
) -> Inspection:
    import numpy as np  # noqa: PLC0415 - slow

    from xpeer.trainer.text import counted  # noqa: PLC0415
    from xpeer.training.document import digest_of_names  # noqa: PLC0415
    from xpeer.training.record_view import MappedRecords  # noqa: PLC0415
    from xpeer.training.token_file import BEGINS  # noqa: PLC0415

    examples = recipe.makes_examples
    training, held_out = parts
    mine, others = table.select(training), table.select(held_out)
    records = MappedRecords(mine, length, examples=examples)
    begins = np.flatnonzero(table.flags & BEGINS)  # of documents: long ones may be in pieces
    sizes = np.add.reduceat(table.tokens, begins)
    lengths = np.quantile(sizes, QUANTILES, method="nearest").tolist()
    return Inspection(
        shard=counted(summary, records),
        digest=digest_of_names(table.whole[begins]),
        documents=int((mine.flags & BEGINS != 0).sum()),
        documents_held_out=int((others.flags & BEGINS != 0).sum()),
        records=len(records),
        records_held_out=len(MappedRecords(others, length, examples=examples)),
        sequence_tokens=length,
        tokens=records.num_tokens(),
        tokens_dropped=int(mine.tokens.sum()) - records.num_tokens(),
        document_tokens={f"{q:g}": int(n) for q, n in zip(QUANTILES, lengths, strict=True)},
        shown=[_spelled(each, recipe.tokenizer) for each in records[:show].tolist()],
    )


def _spelled(record: list[int], tokenizer: Tokenizer) -> str:
    """A record as text; what is predicted stands between marks."""
    from xpeer.training.records import FILL  # noqa: PLC0415 - torch

    ids = [each for each in record if each != FILL]
    plain = [each if each >= 0 else -2 - each for each in ids]
    text, done = "", 0
    spelled = ""
    for is_predicted, run in itertools.groupby(ids, lambda each: each >= 0):
        done += len(list(run))
        # all from the beginning: some decoders write the first token of a text otherwise
        before, spelled = spelled, tokenizer.spell(plain[:done])
        part = spelled[len(before) :]
        text += f"{_MARKS[0]}{part}{_MARKS[1]}" if is_predicted else part
    return text


def _lines(text: Inspection) -> Iterator[str]:
    yield from text.shard.lines()
    yield (
        f"to train on: {text.documents:,} documents, {text.records:,} records of at most "
        f"{text.sequence_tokens} tokens, {text.tokens:,} tokens"
    )
    yield f"held out: {text.documents_held_out:,} documents, {text.records_held_out:,} records"
    yield f"cut off: {text.tokens_dropped:,} tokens that make no record"
    lengths = text.document_tokens
    yield "tokens of a document: " + ", ".join(
        f"{_NAMES.get(q, f'{float(q):.0%}')} {n:,}" for q, n in lengths.items()
    )
    yield f"digest: {text.digest}"
    for number, record in enumerate(text.shown, start=1):
        yield f"record {number}, {_MARKS[0]}predicted{_MARKS[1]}: {record}"
