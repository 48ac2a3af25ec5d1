"""Cuts documents into records: training sequences of T tokens, each from one document.

Shorter ones are filled up with `FILL`, which is no token, since any id might occur in a text. A
shard is cut in files of tokens (`record_view`); here text is cut that fits into memory.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

import torch

from xpeer.errors import ShardError
from xpeer.identity import blake2b
from xpeer.training.document import Document
from xpeer.training.tokenizer import Tokenizer
from xpeer.training.tokens import ids_of

MIN_TOKENS: Final = 8
"""A shorter tail of a document is dropped: it teaches little, and costs the privacy of a record."""
FILL: Final = -1
"""Fills the right of a record that is shorter than T. What is below it: `losses.inputs_of`."""


def cut(documents: Sequence[Document], tokenizer: Tokenizer, sequence_tokens: int) -> torch.Tensor:
    """Tokenise documents that fit into memory, and cut each into records.

    A document becomes begin + text + end, cut every T tokens. Its tail is filled up at the right,
    or dropped if it is shorter than MIN_TOKENS. No record holds text of two documents.

    Args:
        documents: of any length.
        tokenizer: of the swarm.
        sequence_tokens: T.

    Returns:
        (records, T) int64, `FILL` where there is no token.

    Raises:
        ShardError: they do not have enough text for one record.
    """
    before = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    after = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    parts = [torch.empty((0, sequence_tokens), dtype=torch.int32)]
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
    records = torch.cat(parts)
    if not len(records):
        raise ShardError(
            f"no text: none of {len(documents)} documents has {MIN_TOKENS} tokens",
            "name files that hold more text",
        )
    return records.long()


def uniform_of(key: str) -> float:
    """A number in (0, 1) from a hash: documents below the share to hold out are held out.

    So a restart trains on the same text, whatever comes or goes. Where that does not hold, a home
    remembers (`held_out`).
    """
    (number,) = struct.unpack("<Q", blake2b(b"split", key.encode(), size=8))
    return float((number >> 11) + 0.5) / 2.0**53
