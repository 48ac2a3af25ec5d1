"""Reads private text from files, as documents. No text gets into an error or a log.

`files` lists the files, `formats` reads their rows. Every row with text is a document. Knows
nothing of tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from xpeer.errors import ShardError
from xpeer.status import ShardSummary
from xpeer.training.document import Document, corpus_digest, document_of
from xpeer.training.files import find
from xpeer.training.formats import texts
from xpeer.training.formats.examples import Example
from xpeer.training.formats.long import LongText
from xpeer.training.formats.rows import OtherFormError

__all__ = ["Document", "Shard", "corpus_digest", "document_of", "load_documents", "read_shard"]


@dataclass(frozen=True, slots=True)
class Shard:
    """The documents in a shard's files."""

    documents: list[Document]
    summary: ShardSummary


def load_documents(
    patterns: Sequence[str], text_field: str = "text", setting: str = "data.shard"
) -> list[Document]:
    """Do as `read_shard`, without the summary."""
    return read_shard(patterns, text_field, setting).documents


def read_shard(
    patterns: Sequence[str], text_field: str = "text", setting: str = "data.shard"
) -> Shard:
    """Read all text in some files, folders and globs.

    Texts without a visible character are left out. Of equal texts only the first is kept. Files are
    read in the order of the patterns, then by path.

    Args:
        patterns: see `files.find`.
        text_field: name of the field that holds the text, for formats with fields.
        setting: name of the setting, for errors.

    Raises:
        ShardError: no file matches, there is no text, or a file can't be read; names the file, and
            the line or byte.
    """
    matched = find(patterns, setting)
    documents: dict[str, Document] = {}
    skipped: Counter[str] = Counter()
    files = num_texts = characters = 0
    for source in matched.sources:
        try:
            for read in texts(source.path, text_field, skipped, named=source.named):
                num_texts += 1
                document = _document(read, str(source.path))
                if documents.setdefault(document.id, document) is document:
                    characters += len(document.text)
            files += 1
        except OtherFormError as e:
            if source.named:
                raise
            matched.left_out[e.form] += 1
    summary = ShardSummary(
        files=files,
        documents=len(documents),
        characters=characters,
        repeated=num_texts - len(documents),
        skipped=dict(skipped),
        left_out=dict(matched.left_out),
        outside=dict(matched.outside),
    )
    if not documents:
        raise no_text(patterns, setting, summary)
    return Shard(list(documents.values()), summary)


def _document(read: str | LongText | Example, source: str) -> Document:
    if isinstance(read, Example):
        return Document(read.id, "\n".join(content for _, content in read.turns), source)
    return document_of(read if isinstance(read, str) else "".join(read.blocks()), source)


def no_text(patterns: Sequence[str], setting: str, summary: ShardSummary) -> ShardError:
    """Make the error for files in which there is no text."""
    seen = "; ".join(summary.lines()[1:])
    return ShardError(
        f"{setting}: no text in {', '.join(patterns)}" + (f" ({seen})" if seen else ""),
        "name files that hold some text",
    )
