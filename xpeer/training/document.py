"""One text, named by its content. Knows nothing of files, since dividing a corpus needs none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from xpeer.identity import blake2b


@dataclass(frozen=True, slots=True)
class Document:
    """One text. Records are never cut across two."""

    id: str
    """BLAKE2b-128 of the text, hex; for a piece, of its document's id and the piece's number."""
    text: str
    source: str
    """The file it came from."""
    begins: bool = True
    """False for a piece that does not begin its document."""
    ends: bool = True
    """False for a piece that does not end its document."""
    whole: str = ""
    """For a piece, the id of the document that it was cut from; empty = it is a whole document."""

    def __repr__(self) -> str:
        """Describe the document without its text."""
        return f"Document({self.id}, {len(self.text)} characters, {self.source!r})"


def document_of(text: str, source: str) -> Document:
    """Name a text by its content."""
    return Document(blake2b(text.encode(), size=16).hex(), text, source)


def corpus_digest(documents: Iterable[Document]) -> str:
    """BLAKE2b-256 (hex) of the ids of a corpus's documents; files and order do not matter."""
    return digest_of_ids(document.id for document in documents)


def digest_of_ids(ids: Iterable[str]) -> str:
    """Do as `corpus_digest`, by the documents' ids."""
    return blake2b(b"corpus", *sorted(each.encode() for each in ids)).hex()
