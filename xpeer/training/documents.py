"""Private text from files, as documents. Knows no tokens; no text gets into an error or a log.

`files` finds the files, `formats` reads their rows; every row with text is a document.
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
from xpeer.training.formats.plain import OtherFormError

__all__ = ["Document", "Shard", "corpus_digest", "document_of", "load_documents", "read_shard"]


@dataclass(frozen=True, slots=True)
class Shard:
    """What a shard's files hold."""

    documents: list[Document]
    summary: ShardSummary


def load_documents(
    patterns: Sequence[str], text_field: str = "text", setting: str = "data.shard"
) -> list[Document]:
    """`read_shard`, without its summary."""
    return read_shard(patterns, text_field, setting).documents


def read_shard(
    patterns: Sequence[str], text_field: str = "text", setting: str = "data.shard"
) -> Shard:
    """Read all text that some files, folders or globs hold.

    Texts without a visible character are left out; of equal texts the first is kept. Files come in
    the order of the patterns, then by path.

    Args:
        patterns: see `files.find`.
        text_field: of formats with fields.
        setting: named in errors.

    Raises:
        ShardError: nothing matches, no text, or a file can't be read; names file, line or byte.
    """
    found = find(patterns, setting)
    documents: dict[str, Document] = {}
    skipped: Counter[str] = Counter()
    files = texts_found = characters = 0
    for source in found.sources:
        try:
            for text in texts(source.path, text_field, skipped, named=source.named):
                texts_found += 1
                document = document_of(text, str(source.path))
                if documents.setdefault(document.id, document) is document:
                    characters += len(text)
            files += 1
        except OtherFormError as e:
            if source.named:
                raise
            found.left_out[e.form] += 1
    summary = ShardSummary(
        files=files,
        documents=len(documents),
        characters=characters,
        repeated=texts_found - len(documents),
        skipped=dict(skipped),
        left_out=dict(found.left_out),
        outside=dict(found.outside),
    )
    if not documents:
        seen = "; ".join(summary.lines()[1:])
        raise ShardError(
            f"{setting}: no text in {', '.join(patterns)}" + (f" ({seen})" if seen else ""),
            "name files that hold some text",
        )
    return Shard(list(documents.values()), summary)
