"""One text, named by its content. Knows no files: whoever divides a corpus needs no more."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from xpeer.identity import blake2b


@dataclass(frozen=True, slots=True)
class Document:
    """One text. Records are never cut across two."""

    id: str
    """BLAKE2b-128 of the text, hex: the same wherever the text lies."""
    text: str
    source: str
    """The file it came from."""
    begins: bool = True
    ends: bool = True
    """Whether it does so with the document that it is, or is a piece of."""
    whole: str = ""
    """Id of the document that it is a piece of; empty = it is one itself."""

    def __repr__(self) -> str:
        """Never the text."""
        return f"Document({self.id}, {len(self.text)} characters, {self.source!r})"


def document_of(text: str, source: str) -> Document:
    """Name a text by its content."""
    return Document(blake2b(text.encode(), size=16).hex(), text, source)


def corpus_digest(documents: Iterable[Document]) -> str:
    """BLAKE2b-256 (hex) of a corpus: of its documents' names, whatever files they lie in."""
    return blake2b(b"corpus", *sorted(document.id.encode() for document in documents)).hex()
