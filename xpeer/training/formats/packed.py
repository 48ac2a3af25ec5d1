"""Opens files, packed with gzip or not, decodes UTF-8, and recognises what is no text."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

from xpeer.errors import ShardError

RATIO_MAX: Final = 200
"""Most times that a file may grow. Text packs to a fifth or so, the dullest log to a hundredth."""
UNPACKED_FREE: Final = 64 << 20
"""Bytes that any file may unpack to, however small it is."""
UNPACKED_MAX: Final = 16 << 30
"""Bytes that no file may unpack to more than, however large it is."""

_MAGIC: Final = {
    b"%PDF": "a PDF",
    b"SQLite format 3\0": "an SQLite database",
    b"PK\x03\x04": "a zip file (as .docx is, too)",
    b"\x1f\x8b": "packed with gzip",
    b"\x28\xb5\x2f\xfd": "packed with zstd",
    b"BZh": "packed with bzip2",
    b"\xfd7zXZ": "packed with xz",
    b"PAR1": "a Parquet file",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"\xd0\xcf\x11\xe0": "an old Office file",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}


class _Bounded(io.RawIOBase):
    """Reads unpacked bytes, and refuses more than text could unpack to."""

    def __init__(self, packed: gzip.GzipFile, path: Path) -> None:
        self._packed, self._path = packed, path
        size = path.stat().st_size
        self._left = min(max(UNPACKED_FREE, RATIO_MAX * size), UNPACKED_MAX)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._packed.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise ShardError(
                f"{self._path} unpacks to more than {RATIO_MAX} times its size, or than "
                f"{UNPACKED_MAX >> 30} GiB",
                "unpack it yourself if that is meant",
            )
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for its bytes, unpacked if its name ends in .gz.

    Raises:
        ShardError: the file is damaged, or unpacks to far too much.
        OSError: the file can't be read.
    """
    if path.suffix.lower() != ".gz":
        with path.open("rb") as file:
            yield file
        return
    with path.open("rb") as raw, gzip.GzipFile(fileobj=raw) as packed:
        try:
            yield io.BufferedReader(_Bounded(packed, path), 1 << 20)
        except (gzip.BadGzipFile, EOFError, zlib.error) as e:
            raise ShardError(
                f"{path} is damaged: {e}", "restore the file; it should be packed with gzip"
            ) from e


def decoded(data: bytes, path: Path, offset: int = 0) -> str:
    """Decode bytes at an offset of a file as UTF-8.

    Raises:
        ShardError: they are not UTF-8.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        if offset == 0:
            refuse_foreign(data, path)
        raise ShardError(
            f"{path}: byte {offset + e.start} is not UTF-8 ({e.reason})",
            "convert the file to UTF-8, or leave it out",
        ) from e


def refuse_foreign(head: bytes, path: Path) -> None:
    """Refuse a file whose first bytes say that it is no text.

    Raises:
        ShardError: it is no text; says what it is.
    """
    for magic, what in _MAGIC.items():
        if head.startswith(magic):
            raise ShardError(
                f"{path} is {what}, not UTF-8 text",
                "convert it to text, give it the name of its kind, or leave it out",
            )
