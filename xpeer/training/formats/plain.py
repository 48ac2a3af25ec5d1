"""Files that hold one text each."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from xpeer.errors import ShardError
from xpeer.training.formats.long import LongText, begins_as_json, long_text, survey
from xpeer.training.formats.packed import decoded, opened, refuse_foreign
from xpeer.training.formats.rows import OtherFormError, Rows
from xpeer.training.kinds import kind_of

LONG: Final = 8 << 20
"""A longer file, in bytes, is read block by block."""
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


def texts(path: Path, rows: Rows, *, named: bool) -> Iterator[str | LongText]:
    """Read the text of a file, if it has any.

    Raises:
        ShardError: the file is not UTF-8, or no text.
        OtherFormError: the file begins like mark-up, or is JSON.
    """
    with opened(path) as file:
        data = file.read(LONG + 1)
    if data.startswith(_MAY_BE_UTF8):
        refuse_foreign(data, path)
    if len(data) > LONG:
        yield from _long(data[:_HEAD], path, rows, named=named)
        return
    text = decoded(data, path).removeprefix("\ufeff")
    del data
    _refuse_nul(text.count("\0"), len(text), path)
    json_like = _is_json_file(path) and _is_json(text)
    _refuse_form(text[:_HEAD], path, is_json=json_like, named=named)
    if rows.take(text) is not None:
        yield text


def _long(data: bytes, path: Path, rows: Rows, *, named: bool) -> Iterator[LongText]:
    """Read a file that does not fit into memory; `data` is its beginning."""
    head = data.decode(errors="ignore").removeprefix("\ufeff")
    seen = survey(path)
    _refuse_nul(seen.nul, seen.characters, path)
    json_like = _is_json_file(path) and _is_json(head, cut_off=True)
    _refuse_form(head, path, is_json=json_like, named=named)
    if rows.take_long(visible=seen.visible):
        yield long_text(path, seen.num_bytes)


def _refuse_nul(nul: int, characters: int, path: Path) -> None:
    if nul * _NUL_SHARE > characters:
        raise ShardError(
            f"{path}: {nul} of {characters} characters are NUL: UTF-16, or no text",
            "convert the file to UTF-8, or leave it out",
        )


def _refuse_form(head: str, path: Path, *, is_json: bool, named: bool) -> None:
    instead = "" if named else ", or leave it out"
    form = next((f for start, f in _BEGINNINGS.items() if head.lstrip().startswith(start)), "")
    if form or _MARK_UP.match(head):
        raise OtherFormError(
            "mark-up",
            f"{path} is mark-up ({form or 'HTML or XML'}), whose tags would be trained on",
            f"convert it to plain text{instead}",
        )
    if is_json:
        raise OtherFormError(
            "JSON",
            f"{path} is JSON, whose braces and keys would be trained on",
            f"call it .jsonl if each line is an object, else make it so with jq{instead}",
        )


def _is_json_file(path: Path) -> bool:
    """Whether JSON would be a mistake in a file of this name."""
    return kind_of(path) in _JSON_IN


def _is_json(text: str, *, cut_off: bool = False) -> bool:
    """Whether the first lines are JSON objects, or the whole text is one, or a list of them.

    Args:
        text: whole, or its beginning.
        cut_off: whether it is a beginning.
    """
    text = text.lstrip()
    if not text.startswith(("{", "[")):
        return False
    lines = text.split("\n", _LINES_SEEN)
    lines = lines[: -1 if cut_off and len(lines) <= _LINES_SEEN else _LINES_SEEN]
    if any(line.strip() for line in lines) and all(
        _is_object(line) for line in lines if line.strip()
    ):
        return True
    return begins_as_json(text) if cut_off else _is_object(text)


def _is_object(text: str) -> bool:
    try:
        value = json.loads(text, parse_int=float)
    except (ValueError, RecursionError):
        return False
    first = value[0] if isinstance(value, list) and value else value
    return bool(first) and isinstance(first, dict)
