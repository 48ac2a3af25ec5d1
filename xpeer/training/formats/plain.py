"""Files that hold one text each."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from xpeer.errors import ShardError
from xpeer.training.formats.packed import decoded, opened, refuse_foreign
from xpeer.training.formats.rows import Rows

_HEAD: Final = 64 << 10
_MARK_UP: Final = re.compile(
    r"(?:\s++|<!--(?>.*?-->))*+"
    r"<(?:!doctype|\?xml|(?:html|head|body|title|meta|svg|math|rss|feed|mediawiki|tei)\b)",
    re.IGNORECASE | re.DOTALL,
)
"""The beginning of mark-up, after comments. Other tags do not count, as Markdown may begin so."""
_BEGINNINGS: Final = {"{\\rtf": "RTF", "%!PS": "PostScript"}
_JSON_IN: Final = ("", ".txt", ".md")
"""Suffixes of files in which JSON is surely a mistake."""
_LINES_SEEN: Final = 3
_MAY_BE_UTF8: Final = (b"%PDF-", b"SQLite format 3\0", b"PK\x03\x04")
_NUL_SHARE: Final = 4
"""More than one NUL in so many characters means UTF-16 without a byte order mark, or no text."""


class OtherFormError(ShardError):
    """A text has a form that is not to be trained on.

    Attributes:
        form: name of the form.
    """

    def __init__(self, form: str, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.form = form


def texts(path: Path, rows: Rows, *, named: bool) -> Iterator[str]:
    """Read the text of a file, if it has any.

    Raises:
        ShardError: the file is not UTF-8, or no text.
        OtherFormError: the file begins like mark-up, or is JSON.
    """
    with opened(path) as file:
        data = file.read()
    if data.startswith(_MAY_BE_UTF8):
        refuse_foreign(data, path)
    text = decoded(data, path).removeprefix("\ufeff")
    del data
    if text.count("\0") * _NUL_SHARE > len(text):
        raise ShardError(
            f"{path}: {text.count(chr(0))} of {len(text)} characters are NUL: UTF-16, or no text",
            "convert the file to UTF-8, or leave it out",
        )
    _refuse_form(text, path, named=named)
    if rows.take(text) is not None:
        yield text


def _refuse_form(text: str, path: Path, *, named: bool) -> None:
    head = text[:_HEAD]
    instead = "" if named else ", or leave it out"
    form = next((f for start, f in _BEGINNINGS.items() if head.lstrip().startswith(start)), "")
    if form or _MARK_UP.match(head):
        raise OtherFormError(
            "mark-up",
            f"{path} is mark-up ({form or 'HTML or XML'}), whose tags would be trained on",
            f"convert it to plain text{instead}",
        )
    kind = next((s for s in reversed(path.suffixes) if s.lower() != ".gz"), "").lower()
    if kind in _JSON_IN and _is_json(text):
        raise OtherFormError(
            "JSON",
            f"{path} is JSON, whose braces and keys would be trained on",
            f"call it .jsonl if each line is an object, else make it so with jq{instead}",
        )


def _is_json(text: str) -> bool:
    """Whether the first lines are JSON objects, or the whole text is one, or a list of them."""
    if not text.lstrip().startswith(("{", "[")):
        return False
    lines = text.lstrip().split("\n", _LINES_SEEN)[:_LINES_SEEN]
    return all(_is_object(line) for line in lines if line.strip()) or _is_object(text)


def _is_object(text: str) -> bool:
    try:
        value = json.loads(text, parse_int=float)
    except (ValueError, RecursionError):
        return False
    first = value[0] if isinstance(value, list) and value else value
    return bool(first) and isinstance(first, dict)
