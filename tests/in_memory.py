"""A shard that is read, divided and cut in memory, document by document.

What the trainer's files of tokens are compared with, and how tests of formats see text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from xpeer.errors import ShardError
from xpeer.identity import blake2b
from xpeer.status import ShardSummary
from xpeer.training.document import Document, document_of
from xpeer.training.documents import Walk
from xpeer.training.formats.examples import Example
from xpeer.training.formats.long import LongText
from xpeer.training.records import cut, uniform_of
from xpeer.training.tokenizer import Tokenizer


@dataclass(frozen=True)
class Shard:
    documents: list[Document]
    summary: ShardSummary


def read_shard(
    patterns: Sequence[str], text_field: str = "text", setting: str = "data.shard"
) -> Shard:
    walk = Walk(patterns, text_field, setting)
    documents: dict[str, Document] = {}
    for read, number in walk.texts():
        document = _document(read, str(walk.sources[number].path))
        documents.setdefault(document.id, document)
    characters = sum(len(document.text) for document in documents.values())
    return Shard(list(documents.values()), walk.summary(len(documents), characters))


def load_documents(
    patterns: Sequence[str], text_field: str = "text", setting: str = "data.shard"
) -> list[Document]:
    return read_shard(patterns, text_field, setting).documents


def corpus_digest(documents: Iterable[Document]) -> str:
    return blake2b(b"corpus", *sorted(document.id.encode() for document in documents)).hex()


def _document(read: str | LongText | Example, source: str) -> Document:
    if isinstance(read, Example):
        return Document(read.id, "\n".join(content for _, content in read.turns), source)
    return document_of(read if isinstance(read, str) else "".join(read.blocks()), source)


def split(
    documents: Sequence[Document], share: float, by: Literal["document", "file"] = "document"
) -> tuple[list[Document], list[Document]]:
    """Hold out whole documents, or all documents of whole files; see `piece_table.split_pieces`."""
    sets = _hold_out_sets(documents, by)
    uniform = {key: uniform_of(key) for key in sets}
    held_out = {key for key, u in uniform.items() if u < share}
    if len(sets) >= 2:
        if not held_out:
            held_out = {min(uniform, key=lambda key: (uniform[key], key))}
        elif len(held_out) == len(sets):
            held_out.remove(max(uniform, key=lambda key: (uniform[key], key)))
    elif sets:
        held_out = set()
    chosen = {document.id for key in held_out for document in sets[key]}
    training = [document for document in documents if document.id not in chosen]
    return training, [document for document in documents if document.id in chosen]


def _hold_out_sets(documents: Sequence[Document], by: str) -> dict[str, list[Document]]:
    if by == "document":
        return {document.id: [document] for document in documents}
    files: dict[str, list[Document]] = {}
    for document in documents:
        files.setdefault(document.source, []).append(document)
    return {inside[0].id: inside for inside in files.values()}


def cut_owned(
    documents: Sequence[Document], tokenizer: Tokenizer, sequence_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Records, and the number of each one's document."""
    parts, owners = [], list[int]()
    for number, document in enumerate(documents):
        try:
            parts.append(cut([document], tokenizer, sequence_tokens))
        except ShardError:  # it is too short
            continue
        owners += [number] * len(parts[-1])
    return torch.cat(parts), torch.tensor(owners)
