"""`xpeer data`: what a shard holds, counted as the trainer does it. No text is printed."""

from __future__ import annotations

import tempfile
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
    home_option,
    json_option,
    load_config,
)
from xpeer.config import Data, Home
from xpeer.leaves import Local, Parts, seen_by
from xpeer.status import ShardSummary

if TYPE_CHECKING:
    from collections.abc import Iterator

    from xpeer.training.piece_table import PieceTable

QUANTILES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0)
_NAMES = {"0": "least", "0.5": "median", "1": "most"}


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
@click.option("--text-field", help="Field of a row that holds its text. Default: data.text_field.")
@click.option(
    "--tokenizer",
    type=GivenPath(),
    help="Folder of a Hugging Face tokenizer. Default: data.tokenizer, or else bytes.",
)
@click.option(
    "--sequence-tokens",
    type=Whole(8, 1 << 20),
    help="Tokens of a training sequence. Default: as in the home's manifest, or else 512.",
)
def inspect(
    home: Home,
    as_json: bool,
    shard: tuple[str, ...],
    text_field: str | None,
    tokenizer: Path | None,
    sequence_tokens: int | None,
) -> None:
    """Count documents, records and tokens, and say what is left out and why."""
    from xpeer.training.reading import Recipe  # noqa: PLC0415 - slow
    from xpeer.training.tokenizer import ByteTokenizer, HuggingFaceTokenizer  # noqa: PLC0415

    settings = load_config(home).data
    folder = tokenizer or (Path(settings.tokenizer).expanduser() if settings.tokenizer else None)
    words = HuggingFaceTokenizer(folder) if folder else ByteTokenizer()
    recipe = Recipe(words, text_field or settings.text_field)
    patterns = shard or tuple(settings.corpus or settings.shard)
    setting = "--shard" if shard else "data.corpus" if settings.corpus else "data.shard"
    length = sequence_tokens or _length(home)
    with tempfile.TemporaryDirectory(prefix="xpeer-inspect-") as cache:
        from xpeer.trainer.text import read_table  # noqa: PLC0415 - torch
        from xpeer.training.tokenising import ignore  # noqa: PLC0415

        table, summary = read_table(patterns, setting, recipe, Path(cache), ignore)
        inspection = _inspected(table, summary, length, recipe.makes_examples, settings)
    if as_json:
        echo_json(inspection)
        return
    for line in _lines(inspection):
        echo(line)


def _length(home: Home) -> int:
    from xpeer.manifest import Optimiser  # noqa: PLC0415
    from xpeer.manifest.signed import SignedManifest  # noqa: PLC0415

    if home.manifest.exists():
        return SignedManifest.load(home.manifest).open().optimiser.sequence_tokens
    return Optimiser().sequence_tokens


def _inspected(
    table: PieceTable, summary: ShardSummary, length: int, examples: bool, settings: Data
) -> Inspection:
    import numpy as np  # noqa: PLC0415 - slow

    from xpeer.training.document import digest_of_ids  # noqa: PLC0415
    from xpeer.training.piece_table import split_pieces  # noqa: PLC0415
    from xpeer.training.record_view import MappedRecords  # noqa: PLC0415

    training, held_out = split_pieces(table, settings.validation_share, settings.split)
    mine = table.select(training)
    records = MappedRecords(mine, length, examples=examples)
    others = MappedRecords(table.select(held_out), length, examples=examples)
    lengths = np.quantile(table.tokens, QUANTILES, method="nearest").tolist()
    return Inspection(
        shard=summary,
        digest=digest_of_ids(table.wholes()),
        documents=len(training),
        documents_held_out=len(held_out),
        records=len(records),
        records_held_out=len(others),
        sequence_tokens=length,
        tokens=records.num_tokens(),
        tokens_dropped=int(mine.tokens.sum()) - records.num_tokens(),
        document_tokens={f"{q:g}": int(n) for q, n in zip(QUANTILES, lengths, strict=True)},
    )


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
