"""Names the private texts in files, without keeping them. No text gets into an error or a log.

`files` lists the files, `formats` reads their rows. Every row with text is a document. Knows
nothing of tokens.
"""

from __future__ import annotations

import itertools
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from xpeer.errors import ShardError
from xpeer.status import ShardSummary
from xpeer.training.chat import ChatTemplate
from xpeer.training.document import digest_of_names, document_of, firsts, in_hex
from xpeer.training.files import find
from xpeer.training.formats import texts
from xpeer.training.formats.examples import Example
from xpeer.training.formats.long import LongText
from xpeer.training.formats.rows import NO_CHAT, OtherFormError

Array = npt.NDArray[Any]
_BLOCK: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Named:
    """The documents in a shard's files, without their text."""

    ids: Array  # (n, 2) big-endian uint64
    found: Array  # (m, 2) big-endian uint64: ids again, once for each file that holds them
    numbers: Array  # (m,) int64: those files, into `paths`
    paths: list[str]
    summary: ShardSummary

    def digest(self) -> str:
        """As `document.digest_of_names`."""
        return digest_of_names(self.ids)

    def with_files(self) -> Iterator[tuple[str, str]]:
        """Id and path of each document, with every file that holds it."""
        for at in range(0, len(self.found), _BLOCK):
            part = slice(at, at + _BLOCK)
            for name, number in zip(in_hex(self.found[part]), self.numbers[part], strict=True):
                yield name, self.paths[number]


def name_documents(
    patterns: Sequence[str],
    text_field: str = "text",
    setting: str = "data.shard",
    chat: ChatTemplate | None = None,
) -> Named:
    """Name all texts in some files, folders and globs. A text is gone once it is named.

    Texts without a visible character are left out. Equal texts are one document, which may be in
    several files. Files are read in the order of the patterns, then by path.

    Args:
        patterns: see `files.find`.
        text_field: name of the field that holds the text, for formats with fields.
        setting: name of the setting, for errors.
        chat: of the tokenizer: examples that it can't write are left out. None = none is.

    Raises:
        ShardError: no file matches, there is no text, or a file can't be read; names the file, and
            the line or byte.
    """
    walk = Walk(patterns, text_field, setting, chat)
    ids, numbers, sizes = bytearray(), array("q"), array("q")
    for read, number in walk.texts():
        name, size = _name(read)
        ids += bytes.fromhex(name)
        numbers.append(number)
        sizes.append(size)
    pairs = np.frombuffer(bytes(ids), ">u8").reshape(-1, 2)
    first = firsts(pairs.astype(np.uint64))
    files = np.array(numbers, np.int64)
    once = _once_a_file(pairs, files)
    return Named(
        pairs[first],
        pairs[once],
        files[once],
        list(walk.sources.paths()),
        walk.summary(len(first), int(np.array(sizes, np.int64)[first].sum())),
    )


def _once_a_file(ids: Array, files: Array) -> Array:
    """Indices of ids, (n, 2), that did not come before in the same one of the files, (n,)."""
    bounds = np.searchsorted(files, np.unique(files))  # they ascend, as they are read in order
    parts = [
        begin + firsts(ids[begin:end].astype(np.uint64))
        for begin, end in itertools.pairwise([*bounds.tolist(), len(files)])
    ]
    return np.concatenate([np.empty(0, np.int64), *parts])


class Walk:
    """Goes through the texts of a shard, and counts. Holds none of them."""

    def __init__(
        self,
        patterns: Sequence[str],
        text_field: str,
        setting: str,
        chat: ChatTemplate | None = None,
    ) -> None:
        self._patterns, self._field, self._setting = patterns, text_field, setting
        self._chat = chat
        self._matched = find(patterns, setting)
        self.sources = self._matched.sources
        self._skipped: Counter[str] = Counter()
        self._files = self._texts = 0

    def texts(self) -> Iterator[tuple[str | LongText | Example, int]]:
        """All texts, with the numbers of their files."""
        for number, source in enumerate(self.sources):
            try:
                for read in texts(source.path, self._field, self._skipped, named=source.named):
                    if self._chat and isinstance(read, Example) and not self._chat.mark(read):
                        self._skipped[NO_CHAT] += 1
                        continue
                    self._texts += 1
                    yield read, number
                self._files += 1
            except OtherFormError as e:
                if source.named:
                    raise
                self._matched.left_out[e.form] += 1

    def summary(self, documents: int, characters: int) -> ShardSummary:
        """Sum up; raises ShardError if there is no text."""
        summary = ShardSummary(
            files=self._files,
            documents=documents,
            characters=characters,
            repeated=self._texts - documents,
            skipped=dict(self._skipped),
            left_out=dict(self._matched.left_out),
            outside=dict(self._matched.outside),
        )
        if not documents:
            raise no_text(self._patterns, self._setting, summary)
        return summary


def _name(read: str | LongText | Example) -> tuple[str, int]:
    """Id and number of characters of a text."""
    if isinstance(read, Example):
        return read.id, sum(len(content) for _, content in read.turns) + len(read.turns) - 1
    if isinstance(read, str):
        return document_of(read, "").id, len(read)
    return read.id, sum(map(len, read.blocks()))


def no_text(patterns: Sequence[str], setting: str, summary: ShardSummary) -> ShardError:
    """Make the error for files in which there is no text."""
    seen = "; ".join(summary.lines()[1:])
    return ShardError(
        f"{setting}: no text in {', '.join(patterns)}" + (f" ({seen})" if seen else ""),
        "name files that hold some text",
    )
