"""A file that is one text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from xpeer.errors import ShardError
from xpeer.training.formats.packed import decoded, opened, refuse_foreign
from xpeer.training.formats.rows import Rows

MARK_UP: Final = "mark-up"
_MARK_UP: Final = ("<!doctype html", "<html", "<?xml", "<svg")
_NUL_SHARE: Final = 4
"""More than one NUL in so many characters: UTF-16 without a byte order mark, or no text at all."""


class MarkUpError(ShardError):
    """A text that is HTML or XML."""


def texts(path: Path, rows: Rows, *, named: bool) -> Iterator[str]:
    """Its text, if it has any.

    Raises:
        ShardError: no UTF-8, or no text.
        MarkUpError: HTML or XML by its first characters.
    """
    with opened(path) as file:
        data = file.read()
    if data.startswith(b"%PDF-"):  # whose first bytes may be UTF-8
        refuse_foreign(data, path)
    text = decoded(data, path).removeprefix("\ufeff")
    del data
    if text.count("\0") * _NUL_SHARE > len(text):
        raise ShardError(
            f"{path}: {text.count(chr(0))} of {len(text)} characters are NUL: UTF-16, or no text",
            "convert the file to UTF-8, or leave it out",
        )
    if text[:256].lstrip().lower().startswith(_MARK_UP):
        raise MarkUpError(
            f"{path} is mark-up (HTML or XML), whose tags would be trained on",
            "convert it to plain text first" if named else "convert it, or leave it out",
        )
    if rows.take(text) is not None:
        yield text
