"""Tables as text, .csv and .tsv; the first row that is not empty names the fields."""

from __future__ import annotations

import csv
import io
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from xpeer.errors import ShardError
from xpeer.training.formats.examples import Example, fields_of, taken
from xpeer.training.formats.packed import opened
from xpeer.training.formats.rows import NO_COLUMN, OtherFormError, Rows

_DELIMITERS: Final = ",;\t|"
_SPACE: Final = " \r\n"


def texts(path: Path, rows: Rows, delimiter: str) -> Iterator[str | Example]:
    """Read the texts of a table's rows, or their examples: prompts with completions.

    Args:
        path: of the file.
        rows: of that file.
        delimiter: between fields; empty = whichever of comma, semicolon, tab and bar the header has
            most often.

    Raises:
        ShardError: the header lacks a field, a row has more fields than it, quotes are wrong, or
            the file is not UTF-8; names the line.
    """
    csv.field_size_limit(sys.maxsize)  # a text may be long
    with (
        opened(path) as file,
        io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as lines,
    ):
        number = 1
        try:
            reader, above = _rows_of(lines, delimiter)
            header = next(reader, None)
            if header is None:
                rows.take("")
                return
            columns = _columns(header, rows)
            number = above + reader.line_num
            for row in reader:
                begins, number = number + 1, above + reader.line_num
                if any(field.strip() for field in row[len(header) :]):
                    raise _too_wide(path, begins, row, header)
                if len(row) > max(columns):
                    value = taken([row[column] for column in columns], rows)
                    if value is not None:
                        yield value
                elif row:
                    rows.lacking(header)
        except UnicodeDecodeError as e:
            raise ShardError(
                f"{path}: not UTF-8, somewhere after line {number} ({e.reason})",
                "convert the file to UTF-8, or leave it out",
            ) from e
        except csv.Error as e:
            raise ShardError(
                f"{path}: not valid CSV after line {number}: {e}", "correct the quotes there"
            ) from e


def leave_out_other(path: Path, field: str, delimiter: str) -> None:
    """Leave a table out that nobody named, and whose header lacks a field.

    Raises:
        OtherFormError: it is such a table.
        ShardError: the file is damaged.
        OSError: the file can't be read.
    """
    csv.field_size_limit(sys.maxsize)
    with (
        opened(path) as file,
        io.TextIOWrapper(file, encoding="utf-8-sig", errors="replace", newline="") as lines,
    ):
        try:
            header: list[str] = next(_rows_of(lines, delimiter)[0], [])
        except csv.Error:
            header = ["?"]
    if header and not set(fields_of(field)) <= {name.strip() for name in header}:
        raise OtherFormError(
            NO_COLUMN,
            f"{path} has no column {field!r}",
            "set data.text_field to the column that holds its text",
        )


def _rows_of(lines: io.TextIOWrapper, delimiter: str) -> tuple[Any, int]:
    """The reader of a table, from its header on, and the number of lines above; see `texts`."""
    above = 0
    while (first := lines.readline()) and not first.strip(_DELIMITERS + _SPACE):
        above += 1
    delimiter = delimiter or max(_DELIMITERS, key=first.count)
    rest = itertools.chain([first], lines) if first else lines
    return csv.reader(rest, delimiter=delimiter, strict=True), above


def _too_wide(path: Path, line: int, row: list[str], header: list[str]) -> ShardError:
    """Make the error for a row of which a part would be lost: most likely a text without quotes."""
    columns = "column" if len(header) == 1 else "columns"
    return ShardError(
        f"{path}:{line}: {len(row)} fields, but the header has {len(header)} {columns}",
        "put quotes around the text of that row, or take the row out",
    )


def _columns(header: list[str], rows: Rows) -> list[int]:
    names = [name.strip() for name in header]
    wanted = fields_of(rows.field)
    if not set(wanted) <= set(names):
        raise rows.no_field(names)
    for name in wanted:
        if names.count(name) > 1:
            raise ShardError(
                f"{rows.path} has {names.count(name)} columns named {name!r}", "rename all but one"
            )
    return [names.index(name) for name in wanted]
