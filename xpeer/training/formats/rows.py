"""Decides which rows have text, by one rule for all formats.

A row without text is skipped and counted: the field is missing or null, or its value is not text (a
number, a list) or has no visible character. If no row of a file has the field, or none has text in
it, the file or the field was named by mistake, and that is an error.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from xpeer.errors import ShardError

NO_COLUMN: Final = "table without the column"
"""A form of text that is not read: a table in a folder whose header lacks `data.text_field`."""
EMPTY: Final = "empty"
NULL: Final = "null"
NO_FIELD: Final = "no field"
NOT_TEXT: Final = "not text"
NO_EXAMPLE: Final = "no example"
NO_CHAT: Final = "template"
REASONS: Final = (EMPTY, NULL, NO_FIELD, NOT_TEXT, NO_EXAMPLE, NO_CHAT)
"""All reasons to skip a row, in an order that the cache of tokens keeps."""

CHATS: Final = (
    "set data.text_field to a field of texts; chats are read from a field called messages, each "
    "message with role and content: rename the field, and convert other keys, as from and value"
)
"""Remedy where a field holds lists."""
_BLANK: Final = frozenset("\u115f\u1160\u3164\uffa0\u2800\ufffc\ufffd")
"""Letters and symbols that mean nothing: Hangul fillers, the empty Braille cell, and the signs for
an object and for a lost character."""
_MOST_NAMES: Final = 20
_KINDS: Final = {
    bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object",
}  # fmt: skip


def holds_text(text: str) -> bool:
    """Whether a reader would see anything of a text.

    Letters, digits, punctuation and symbols are visible. Spaces, controls, format characters
    (Unicode's categories Z and C), and marks on their own (M) are not.
    """
    return any(map(_is_visible, text[:64])) or any(map(_is_visible, set(text)))


def _is_visible(character: str) -> bool:
    return unicodedata.category(character)[0] in "LNPS" and character not in _BLANK


class OtherFormError(ShardError):
    """A text has a form that is not to be trained on.

    Attributes:
        form: name of the form.
    """

    def __init__(self, form: str, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.form = form


class Rows:
    """The rows of one file.

    Args:
        path: of the file.
        field: name of the field that holds the text.
        skipped: counts of skipped rows, by reason; added to.
    """

    def __init__(self, path: Path, field: str, skipped: Counter[str]) -> None:
        self.path, self.field, self._skipped = path, field, skipped
        self._rows = self._without = self._texts = 0
        self._other_fields: dict[str, None] = {}
        self._other_kind = ""
        self._no_example = False

    def take(self, value: object) -> str | None:
        """Count a row that has the field; returns its text, or None if it is skipped."""
        self._rows += 1
        if value is None:
            self._skipped[NULL] += 1
        elif not isinstance(value, str):
            self._skipped[NOT_TEXT] += 1
            self._other_kind = self._other_kind or _KINDS.get(type(value), type(value).__name__)
        elif not holds_text(value):
            self._texts += 1
            self._skipped[EMPTY] += 1
        else:
            self._texts += 1
            return value
        return None

    def take_long(self, *, visible: bool) -> bool:
        """Count a text that is not in memory; returns whether it is to be read."""
        self._rows += 1
        self._texts += 1
        self._skipped[EMPTY] += not visible
        return visible

    def take_example(self, *, usable: bool) -> bool:
        """Count a row that is to be an example; returns whether it is one."""
        self._rows += 1
        self._texts += usable
        if not usable:
            self._skipped[NO_EXAMPLE] += 1
            self._no_example = True
        return usable

    def lacking(self, fields: Iterable[str]) -> None:
        """Count a row that lacks the field, but has these fields."""
        self._rows += 1
        self._without += 1
        self._skipped[NO_FIELD] += 1
        if len(self._other_fields) < _MOST_NAMES:
            self._other_fields.update(dict.fromkeys(fields))

    def finish(self) -> None:
        """Check the counts after the last row.

        Raises:
            ShardError: no row had the field, or none had text in it.
        """
        if self._rows and self._without == self._rows:
            raise self.no_field(self._other_fields)
        if self._other_kind and not self._texts:
            raise self.no_text(self._other_kind)
        if self._no_example and not self._texts:
            raise ShardError(
                f"{self.path}: no row of {self.field!r} is an example to imitate",
                "of messages each needs role and content, both text, one in the field that is "
                "predicted has to be the assistant's, and there may be no calls of tools; "
                "convert other keys, as from and value",
            )

    def no_field(self, fields: Iterable[str]) -> ShardError:
        """Make the error for a file in which no row has the field."""
        names = sorted(fields)[:_MOST_NAMES]
        return ShardError(
            f"{self.path}: no row has field {self.field!r} (fields: {', '.join(names) or 'none'})",
            "set data.text_field to the field that holds the text",
        )

    def no_text(self, kind: str) -> ShardError:
        """Make the error for a file in which the field never holds text."""
        remedy = (
            CHATS
            if kind == _KINDS[list]
            else "set data.text_field to the field that holds the text"
        )
        return ShardError(f"{self.path}: field {self.field!r} is no text but {kind}", remedy)
