"""Splits a shard's documents into training and validation, and cuts them into records.

A record is one training sequence of T tokens from one document. Shorter ones are filled up with
`FILL`, which is no token, since any id might occur in a text. All random choices here are hashes.
So a restart trains on the same text, and no text moves from validation to training.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Final, Literal, TypeVar

import torch

from xpeer.errors import ShardError
from xpeer.identity import blake2b
from xpeer.training.documents import Document, load_documents
from xpeer.training.tokenizer import Tokenizer
from xpeer.training.tokens import ids_of

__all__ = [
    "Document",
    "cut",
    "cut_owned",
    "load_documents",
    "split",
]

MIN_TOKENS: Final = 8
"""A shorter tail of a document is dropped: it teaches little, and costs the privacy of a record."""
FILL: Final = -1
"""Fills the right of a record that is shorter than T. What is below it: `losses.inputs_of`."""
_T = TypeVar("_T")


def split(
    documents: Sequence[Document], share: float, by: Literal["document", "file"] = "document"
) -> tuple[list[Document], list[Document]]:
    """Hold out whole documents, or all documents of whole files.

    Whether a document is held out depends only on its content, so a new document moves no other.
    Very small shards are an exception. If nothing (or everything) would be held out, the document
    with the lowest (highest) hash changes sides.

    Args:
        documents: of the shard, each once.
        share: expected fraction to hold out.
        by: whether single documents or files are held out.

    Returns:
        Documents for training and for validation. Neither list is empty if there are at least two
        documents (files).
    """
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


def cut(documents: Sequence[Document], tokenizer: Tokenizer, sequence_tokens: int) -> torch.Tensor:
    """Do as `cut_owned`, but return only the records."""
    return cut_owned(documents, tokenizer, sequence_tokens)[0]


def cut_owned(
    documents: Sequence[Document], tokenizer: Tokenizer, sequence_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokenise documents, and cut each into records.

    A document becomes begin + text + end, cut every T tokens. Its tail is filled up at the right,
    or dropped if it is shorter than MIN_TOKENS. No record holds text of two documents.

    Args:
        documents: of any length.
        tokenizer: of the swarm.
        sequence_tokens: T.

    Returns:
        (records, T) int64, `FILL` where there is no token; and the number of each record's
        document, (records,) int64, ascending.

    Raises:
        ShardError: they do not have enough text for one record.
    """
    before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    after = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    parts = []
    for document in documents:
        begin, end = before if document.begins else [], after if document.ends else []
        ids = torch.cat(
            [
                torch.tensor(begin, dtype=torch.int32),
                ids_of(tokenizer, document.text),
                torch.tensor(end, dtype=torch.int32),
            ]
        )
        tail = len(ids) % sequence_tokens
        if 0 < tail < MIN_TOKENS:
            ids = ids[: len(ids) - tail]
        elif tail:
            ids = torch.nn.functional.pad(ids, (0, sequence_tokens - tail), value=FILL)
        parts.append(ids.view(-1, sequence_tokens))
    records = torch.cat(parts) if parts else torch.empty((0, sequence_tokens), dtype=torch.int32)
    if not len(records):
        raise ShardError(
            f"no text: none of {len(documents)} documents has {MIN_TOKENS} tokens",
            "name files that hold more text",
        )
    counts = torch.tensor([len(part) for part in parts])
    return records.long(), torch.arange(len(parts)).repeat_interleave(counts)


def _hold_out_sets(documents: Sequence[Document], by: str) -> dict[str, list[Document]]:
    """Group documents that are held out together, by a key that depends only on content."""
    if by == "document":
        return {document.id: [document] for document in documents}
    files = _grouped(documents, lambda document: document.source)
    return {
        blake2b(*(document.id.encode() for document in inside), size=16).hex(): inside
        for inside in files.values()
    }


def _grouped(items: Sequence[_T], key: Callable[[_T], str]) -> dict[str, list[_T]]:
    groups: dict[str, list[_T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def uniform_of(key: str) -> float:
    """A number in (0, 1) from a hash: documents below the share to hold out are held out."""
    (number,) = struct.unpack("<Q", blake2b(b"split", key.encode(), size=8))
    return float((number >> 11) + 0.5) / 2.0**53
