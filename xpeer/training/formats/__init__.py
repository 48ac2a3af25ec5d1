"""Reads the texts of one file, by its format, row by row.

    .txt, .md, other text     the file is one row
    .jsonl, .ndjson           one object a line
    .parquet                  one row of the table
    .csv, .tsv                one row under a header
    .arrow                    one row of a table that `datasets` saved

Texts, lines and .csv may be packed with gzip or zstd (`.txt.gz`). `rows` decides about rows without
text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from xpeer.errors import ShardError
from xpeer.training.formats import arrow, delimited, jsonl, parquet, plain
from xpeer.training.formats.examples import Example, asks_for_examples
from xpeer.training.formats.long import LongText
from xpeer.training.formats.rows import Rows
from xpeer.training.kinds import kind_of


def texts(
    path: Path, text_field: str, skipped: Counter[str], *, named: bool
) -> Iterator[str | LongText | Example]:
    """Read the visible texts of a file, or its examples.

    Args:
        path: of the file.
        text_field: name of the field that holds the text, for formats with fields.
        skipped: counts of rows without text, by reason; added to.
        named: whether the operator named this very file; then no error advises to leave it out.

    Raises:
        ShardError: the file can't be read, or is not what its name says; names file and place.
    """
    rows = Rows(path, text_field, skipped)
    try:
        match kind_of(path):
            case ".jsonl" | ".ndjson":
                yield from jsonl.texts(path, rows)
            case ".parquet":
                yield from parquet.texts(path, rows)
            case ".arrow":
                yield from arrow.texts(path, rows)
            case ".csv" | ".tsv" as kind:
                delimiter = "\t" if kind == ".tsv" else ""
                if not named:
                    delimited.leave_out_other(path, text_field, delimiter)
                yield from delimited.texts(path, rows, delimiter)
            case _ if asks_for_examples(text_field):
                raise ShardError(
                    f"{path}: examples ({text_field}) are read from tables: .jsonl, .parquet, "
                    ".csv and .arrow",
                    "leave the file out, or set data.text_field to a field of texts",
                )
            case _:
                yield from plain.texts(path, rows, named=named)
    except OSError as e:
        raise ShardError(f"{path} can't be read: {e.strerror or e}", _remedy(e)) from e
    rows.finish()


def _remedy(error: OSError) -> str:
    if isinstance(error, PermissionError):
        return "check its owner and mode"
    return "check the disk and the file"
