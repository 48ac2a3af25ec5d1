"""One file of tokens in the cache: whole and verified, or not there.

    tokens      little endian, in the smallest unsigned type that holds the vocabulary
    passages    a table: whose tokens they are
    sources     a table: which part of which text file was read
    footer      sizes, and digests of tokens and tables

A passage is a stretch of the tokens of one document, or of a piece of one. Few documents have more
than one passage: those that were longer than what was left of a file. Knows nothing of tokenizers.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from xpeer.files import sync
from xpeer.training.formats.rows import REASONS
from xpeer.training.tensor_file import CorruptFileError

SUFFIX: Final = ".tokens"
STAGING: Final = ".writing-"

BEGINS: Final = 1
"""The piece of this passage begins its document."""
ENDS: Final = 2
"""The piece of this passage ends its document."""
OPEN: Final = 4
"""The tokens go on in another file."""
CONTINUES: Final = 8
"""The tokens began in another file."""
READ: Final = 16
"""The piece is an example of which no token is predicted."""

PASSAGE: Final = np.dtype(
    [
        ("id", ">u8", (2,)),  # BLAKE2b-128 of the text; for a piece, see `Document.id`
        ("whole", ">u8", (2,)),  # id of the whole document
        ("tokens", "<u8"),
        ("characters", "<u8"),
        ("uniform", "<f8"),  # decides whether the document is held out; see `records.uniform_of`
        ("flags", "u1"),
    ]
)
SOURCE: Final = np.dtype(
    [
        ("key", ">u8", (2,)),  # path, size and times of the text file; see `token_cache.key_of`
        ("first", "<u8"),  # pieces of the text file that earlier entries hold
        ("characters", "<u8"),  # characters of the next piece that earlier entries hold
        ("passages", "<u8"),
        ("complete", "u1"),  # whether the text file ends here
        ("form", "u1"),  # why nothing was read: index into `token_cache.FORMS`; 0 = it was read
        ("skipped", "<u8", (len(REASONS),)),  # rows without text; known where it is complete
    ]
)
_FOOTER: Final = struct.Struct("<8s4q16s16s")
_MAGIC: Final = b"xptok/1\0"
_BLOCK: Final = 16 << 20
_WAITING: Final = 1 << 16
"""Tokens that are written at once."""

Table = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class TokenFile:
    """A file of tokens that was opened."""

    path: Path
    tokens: Table  # (n,) uint16 or uint32, mapped
    passages: Table  # (passages,) PASSAGE, mapped
    sources: Table  # (sources,) SOURCE, mapped; their passages follow one another


class TokenFileWriter:
    """Writes one file of tokens. It can't be seen before `publish`.

    Args:
        folder: exists, mode 0700.
        dtype: type of the tokens.

    Attributes:
        num_tokens: tokens written so far.

    Raises:
        OSError: the file can't be made; `add` and `publish`, too, raise this.
    """

    def __init__(self, folder: Path, dtype: npt.DTypeLike) -> None:
        self.num_tokens = 0
        self._dtype = np.dtype(dtype)
        name = os.urandom(8).hex()
        self._path, self._beside = folder / f"{name}{SUFFIX}", folder / f"{STAGING}{name}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._file = open(os.open(self._beside, flags, 0o600), "wb")  # noqa: PTH123, SIM115 - a mode
        self._digest = hashlib.blake2b(digest_size=16)
        self._waiting: list[Table] = []
        """Tokens that are still to be written: those of short texts, together."""
        self._written = 0

    def add(self, tokens: Table) -> None:
        """Append tokens, (n,) of the file's type."""
        self._waiting.append(tokens)
        self.num_tokens += len(tokens)
        if self.num_tokens - self._written >= _WAITING:
            self._write()

    def publish(self, passages: Table, sources: Table) -> Path:
        """Add the tables, and give the file its name once all of it is on the disk."""
        self._write()
        tables = passages.tobytes() + sources.tobytes()
        sizes = self.num_tokens, self._dtype.itemsize, len(passages), len(sources)
        tokens = self._digest.digest()
        self._file.write(tables)
        digest = hashlib.blake2b(_of_head(sizes, tokens) + tables, digest_size=16).digest()
        self._file.write(_FOOTER.pack(_MAGIC, *sizes, tokens, digest))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._beside.replace(self._path)
        sync(self._path.parent)
        return self._path

    def _write(self) -> None:
        if self._waiting:
            data = np.concatenate(self._waiting).astype(self._dtype).data.cast("B")
            self._digest.update(data)
            self._file.write(data)
        self._waiting, self._written = [], self.num_tokens

    def discard(self) -> None:
        """Remove what was written, unless it is published."""
        with contextlib.suppress(OSError):  # on a full disk: what is left is written once more
            self._file.close()
        with contextlib.suppress(OSError):
            self._beside.unlink(missing_ok=True)


def open_token_file(path: Path, *, verify: bool) -> TokenFile:
    """Map a file of tokens.

    Args:
        path: of the file.
        verify: whether all tokens are read, too, to compare their digest.

    Raises:
        CorruptFileError: it is cut off, altered, unreadable, or not written by us.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - _FOOTER.size))
            footer = file.read()
            if len(footer) != _FOOTER.size or not footer.startswith(_MAGIC):
                raise CorruptFileError("it is cut off, or not written by xpeer")
            _, *sizes, tokens_digest, tables_digest = _FOOTER.unpack(footer)
            num_tokens, width, num_passages, num_sources = sizes
            of_passages = num_passages * PASSAGE.itemsize
            of_tables = of_passages + num_sources * SOURCE.itemsize
            if width not in (2, 4) or num_tokens * width + of_tables + _FOOTER.size != size:
                raise CorruptFileError("its sizes do not add up")
            head = _of_head(tuple(sizes), tokens_digest)
            if _digest_of(file, num_tokens * width, of_tables, head) != tables_digest:
                raise CorruptFileError("its tables do not match their digest")
            if verify and _digest_of(file, 0, num_tokens * width) != tokens_digest:
                raise CorruptFileError("its tokens do not match their digest")
            # once, since each mapping keeps a descriptor
            mapped = np.asarray(np.memmap(file, np.uint8, "r"))
            at_passages, at_sources = num_tokens * width, num_tokens * width + of_passages
            tokens = mapped[:at_passages].view(f"<u{width}")
            passages = mapped[at_passages:at_sources].view(PASSAGE)
            sources = mapped[at_sources : at_passages + of_tables].view(SOURCE)
    except (OSError, ValueError, OverflowError) as e:
        raise CorruptFileError(" ".join(str(e).split()) or type(e).__name__) from e
    if int(sources["passages"].sum()) != num_passages or (
        int(passages["tokens"].sum()) != num_tokens
    ):
        raise CorruptFileError("its tables do not add up")
    return TokenFile(path, tokens, passages, sources)


def _digest_of(file: Any, begin: int, left: int, head: bytes = b"") -> bytes:
    file.seek(begin)
    digest = hashlib.blake2b(head, digest_size=16)
    while left:
        data = file.read(min(left, _BLOCK))
        if not data:
            break
        digest.update(data)
        left -= len(data)
    return digest.digest()


def _of_head(sizes: tuple[int, ...], tokens: bytes) -> bytes:
    """What the digest of the tables begins with."""
    return struct.pack("<4q", *sizes) + tokens
