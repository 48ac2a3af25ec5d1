"""One JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from xpeer.errors import ShardError
from xpeer.training.formats.examples import Example, fields_of, taken
from xpeer.training.formats.packed import decoded, opened, refuse_foreign
from xpeer.training.formats.rows import Rows

# Numbers are never used, and Python's int refuses more than 4,300 digits, which JSON allows.
_DECODER: Final = json.JSONDecoder(parse_int=float)


def texts(path: Path, rows: Rows) -> Iterator[str | Example]:
    """Read the texts of a file's lines; blank lines are ignored.

    If an object has a field twice, the last one counts, as for most readers of JSON.

    Raises:
        ShardError: a line is no JSON object; names the line.
    """
    offset = 0
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            text = decoded(line, path, offset).strip(" \t\r\n\ufeff")
            offset += len(line)
            if text:
                if number == 1 and not text.startswith("{"):
                    refuse_foreign(line, path)
                value = _text(text, rows, f"{path}:{number}")
                if value is not None:
                    yield value


def _text(line: str, rows: Rows, where: str) -> str | Example | None:
    try:
        row = _DECODER.decode(line)
    except json.JSONDecodeError as e:
        raise ShardError(
            f"{where}: not valid JSON at character {e.pos + 1} of the line ({e.msg})",
            "correct that line, or take it out; each line must be one object",
        ) from e
    except RecursionError as e:
        raise ShardError(
            f"{where}: not valid JSON, or nested too deeply to be read",
            "take that line out, or the nested field",
        ) from e
    if not isinstance(row, dict):
        raise ShardError(f"{where}: not a JSON object", "each line must be one object")
    names = fields_of(rows.field)
    if any(name not in row for name in names):
        rows.lacking(row)
        return None
    value = taken([row[name] for name in names], rows)
    for text in (value,) if isinstance(value, str) else value.texts if value else ():
        _refuse_halves(text, rows, where)
    return value


def _refuse_halves(text: str, rows: Rows, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ShardError(
            f"{where}: field {rows.field!r} has half a surrogate pair at character {e.start}",
            "correct that escape",
        ) from e
