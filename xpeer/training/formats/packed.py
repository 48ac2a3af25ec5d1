"""Opens files, packed with gzip or zstd or not, decodes UTF-8, and recognises what is no text."""

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

    def __init__(self, packed: Any, path: Path) -> None:
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
    """Open a file for its bytes, unpacked if its name ends in .gz or .zst.

    Raises:
        ShardError: the file is damaged, unpacks to far too much, or pyarrow is missing for .zst.
        OSError: the file can't be read.
    """
    kind = path.suffix.lower()
    with path.open("rb") as raw:
        if kind == ".gz":
            with gzip.GzipFile(fileobj=raw) as packed, _saying_damaged(path, "gzip"):
                yield io.BufferedReader(_Bounded(packed, path), 1 << 20)
        elif kind == ".zst":
            with _saying_damaged(path, "zstd"):
                yield io.BufferedReader(_Bounded(_zstd(raw, path), path), 1 << 20)
        else:
            yield raw


@contextmanager
def _saying_damaged(path: Path, packer: str) -> Iterator[None]:
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise _damaged(path, e, packer) from e
    except OSError as e:
        if e.errno or packer != "zstd":  # pyarrow raises OSError for what it can't unpack
            raise
        raise _damaged(path, e, packer) from e


def _damaged(path: Path, error: Exception, packer: str) -> ShardError:
    why = " ".join(str(error).split())
    return ShardError(
        f"{path} is damaged: {why}", f"restore the file; it should be packed with {packer}"
    )


def _zstd(raw: IO[bytes], path: Path) -> Any:
    try:
        import pyarrow as pa  # noqa: PLC0415 - slow
    except ImportError as e:
        raise ShardError(f"{path}: reading .zst needs pyarrow", "pip install pyarrow") from e
    return pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")


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
        raise not_utf8(path, offset + e.start, e.reason) from e


def not_utf8(path: Path, place: int, reason: str) -> ShardError:
    """Make the error for a byte that is not UTF-8."""
    return ShardError(
        f"{path}: byte {place} is not UTF-8 ({reason})",
        "convert the file to UTF-8, or leave it out",
    )


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
