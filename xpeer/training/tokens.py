"""Tokenises a text of any length piece by piece.

The tokenizers library needs some 250 bytes a token while it works, and its time grows faster than
the text. 10 MB with a token a byte took 2.4 GB and 66 s; in pieces 0.2 GB and 28 s.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Final

import torch

from xpeer.training.tokenizer import Tokenizer

PIECE: Final = 1 << 16
"""Characters in a piece, about."""
LONGEST: Final = 1 << 22
"""A part of so many characters ends wherever it may, so that memory stays bounded."""
WINDOW: Final = 128
"""Characters on either side of a seam that are used to check whether it changes a token."""
_LOOK_BACK: Final = 4096
_TRIES: Final = 16
_SPACE: Final = re.compile(r"\s")
_EDGE: Final = re.compile(r"\S(?=\s)|\s(?=\S)")


def ids_of(tokenizer: Tokenizer, text: str) -> torch.Tensor:
    """Compute the ids of the whole text, (n,) int32, as if it were tokenised at once.

    Only if a word without spaces is longer than a piece, its tokens may differ at the seams.
    """
    parts = [
        torch.tensor(tokenizer.encode(part), dtype=torch.int32)
        for part in parts_of(tokenizer, [text])
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def parts_of(tokenizer: Tokenizer, blocks: Iterable[str]) -> Iterator[str]:
    """Cut a text where its tokens meet in any context, so that the parts can be encoded apart.

    A part has about PIECE characters. No more than LONGEST characters and one block are held in
    memory.

    Args:
        tokenizer: its tokens may not change by a cut.
        blocks: the text, in blocks of any length.
    """
    source = iter(blocks)
    text, start, end, ended = "", 0, PIECE, False
    while True:
        while not ended and len(text) <= end + WINDOW:
            block = next(source, None)
            if block is None:
                ended = True
            elif block:
                text, start, end = text[start:] + block, 0, end - start
        if end >= len(text):
            break
        seam = _seam(tokenizer, text, start, end)
        if seam is None and end - start >= LONGEST:
            seam = end
        if seam is None:  # make this part longer
            end += PIECE
        else:
            yield text[start:seam]
            start, end = seam, seam + PIECE
    yield text[start:]


def _seam(tokenizer: Tokenizer, text: str, start: int, end: int) -> int | None:
    """Search a place before `end` where two tokens meet in any context; None = there is none."""
    first = max(start, end - _LOOK_BACK)
    # before or after spaces, as tokenizers differ, but not between them: a run may be long
    edges = [first + edge.end() for edge in _EDGE.finditer(text[first:end])]
    if not edges and not _SPACE.search(text[first:end]):
        edges = list(range(end - _TRIES, end))
    for place in reversed(edges[-_TRIES:]):
        left, right = text[max(start, place - WINDOW) : place], text[place : place + WINDOW]
        if left and tokenizer.encode(left + right) == [
            *tokenizer.encode(left),
            *tokenizer.encode(right),
        ]:
            return place
    return None
