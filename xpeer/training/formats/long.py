"""Texts that are too long to be held in memory: read block by block, each time they are needed."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from xpeer.errors import ShardError
from xpeer.training.formats.packed import not_utf8, opened
from xpeer.training.formats.rows import holds_text

BLOCK: Final = 1 << 20
"""Bytes that are read at once."""
_OBJECT: Final = re.compile(r"\s*(?:\[\s*)?\{")


@dataclass(frozen=True, slots=True)
class LongText:
    """A text file that is one document.

    Attributes:
        path: of the file.
        id: as `document_of` computes it.
        num_bytes: bytes of UTF-8, without a byte order mark.
    """

    path: Path
    id: str
    num_bytes: int

    def blocks(self) -> Iterator[str]:
        """Read the text.

        Raises:
            ShardError: it is no longer the text that was named.
        """
        digest = _named(self.num_bytes)
        for block in decoded_blocks(self.path):
            digest.update(block.encode())
            yield block
        if digest.hexdigest() != self.id:
            raise changed(self.path)


@dataclass(frozen=True, slots=True)
class Survey:
    """What one has to know of a text before it is read."""

    num_bytes: int
    characters: int
    nul: int
    """Number of NUL characters."""
    visible: bool
    """Whether a reader would see anything of it."""


def survey(path: Path) -> Survey:
    """Read a file once.

    Raises:
        ShardError: it is not UTF-8.
    """
    num_bytes = characters = nul = 0
    visible = False
    for block in decoded_blocks(path):
        num_bytes += len(block.encode())
        characters += len(block)
        nul += block.count("\0")
        visible = visible or holds_text(block)
    return Survey(num_bytes, characters, nul, visible)


def long_text(path: Path, num_bytes: int) -> LongText:
    """Name the text of a file by its content."""
    digest = _named(num_bytes)
    for block in decoded_blocks(path):
        digest.update(block.encode())
    return LongText(path, digest.hexdigest(), num_bytes)


def decoded_blocks(path: Path) -> Iterator[str]:
    """Read a file as UTF-8, without a byte order mark.

    Raises:
        ShardError: it is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, first = 0, True
    with opened(path) as file:
        while True:
            data = file.read(BLOCK)
            waiting = len(decoder.getstate()[0])
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as e:
                raise not_utf8(path, offset - waiting + e.start, e.reason) from e
            offset += len(data)
            if first and text:
                text, first = text.removeprefix("\ufeff"), False
            if text:
                yield text
            if not data:
                return


def begins_as_json(head: str) -> bool:
    """Whether a text that begins so may be an object of JSON, or a list of them."""
    if not _OBJECT.match(head):
        return False
    try:
        json.loads(head, parse_int=float)
    except json.JSONDecodeError as e:
        # cut off in the middle of a string, or of anything else at its very end
        return e.msg.startswith("Unterminated string") or e.pos >= len(head.rstrip()) - 1
    except (ValueError, RecursionError):
        return False
    return True


def changed(path: Path) -> ShardError:
    """Make the error for a file that was written while it was read."""
    return ShardError(f"{path} changed while it was read", "start again once it is complete")


def _named(num_bytes: int) -> hashlib.blake2b:
    """The hash of `identity.blake2b` with one part of so many bytes, still without them."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(num_bytes.to_bytes(8, "little"))
    return digest
