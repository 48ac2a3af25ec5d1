"""Tensors and a few words in one file that is either whole and verified, or not there.

The format is safetensors'. Its metadata also holds a digest of names, words and values, since
safetensors checks sizes only. We write the file ourselves, in pieces. The writer of safetensors
copies everything first, holds up every other thread, and reports no progress.

A file is read without a copy of it: it is hashed in pieces, and then mapped into memory.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError

from xpeer.errors import LocalError
from xpeer.files import sync
from xpeer.shortage import in_words, out_of_memory

STAGING: Final = ".writing-"
"""How names begin of what is being written. A crash leaves them; `clear_staging` removes them."""
_DIGEST: Final = "digest"
_PIECE: Final = 16 << 20
"""Bytes written between two syncs of the disk."""
_KINDS: Final = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_TYPES: Final = {kind: dtype for dtype, kind in _KINDS.items()}
_MAX_HEADER: Final = 100_000_000
"""The bound that safetensors itself has, in bytes."""

OnProgress = Callable[[int, int], None]
"""Called with bytes done and bytes in all. Every byte counts twice: it is hashed, then written."""


def _ignore(_done: int, _total: int) -> None:
    """Ignore the progress."""


class CorruptFileError(Exception):
    """The file is damaged, incomplete, or not written by us. The message says which."""


@dataclass(frozen=True, slots=True)
class Pending:
    """A tensor that is made when its turn to be written comes, and is forgotten afterwards."""

    dtype: torch.dtype
    """It is written in this type, and converted piece by piece."""
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]
    """Makes it, on any device and in any type."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.dtype.itemsize * math.prod(self.shape)


def write_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    words: Mapping[str, str],
    on_progress: OnProgress = _ignore,
) -> str:
    """Write a file, mode 0600, in place of any that is there; durable when this returns.

    After a crash at any moment the old file, if there was one, is still whole.

    Args:
        path: its folder is made, mode 0700, if need be.
        tensors: contiguous, CPU, not sharing memory.
        words: stored in the metadata.
        on_progress: called after every piece.

    Returns:
        The digest, BLAKE2b-256 in hex.

    Raises:
        LocalError: disk full, no right to write.
    """
    staging: Path | None = None
    size = sum(tensor.nbytes for tensor in tensors.values())
    entries = [_Entry.of(name, tensor) for name, tensor in tensors.items()]
    digest = _digest(entries, words, lambda done: on_progress(done, 2 * size))
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=STAGING, dir=path.parent))  # mode 0700
        beside = staging / path.name
        save_file(
            tensors,
            beside,
            words={**words, _DIGEST: digest},
            on_progress=lambda done: on_progress(size + done, 2 * size),
        )
        beside.replace(path)
        sync(path.parent)
    except (OSError, SafetensorError, RuntimeError) as e:
        if out_of_memory(e):  # torch has none left for a copy
            raise in_words(e) from e
        raise LocalError(
            f"{path} can't be written: {e}", "check free space and rights on that disk"
        ) from e
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return digest


class Pages:
    """The part of this process's memory that a file is mapped into."""

    def __init__(self, file: io.RawIOBase) -> None:
        self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)

    def tensor(self, begin: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor whose bytes begin at this place of the file; writing to it changes no file."""
        count = math.prod(shape)
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=begin).view(shape)

    def forget(self) -> None:
        """Give back the memory of what was read so far. It is read again when it is used.

        What was written to a tensor of this file is lost.
        """
        self._map.madvise(mmap.MADV_DONTNEED)


def map_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str], Pages]:
    """Map what `write_tensors` wrote into memory; every bit of it is checked first.

    Returns:
        Tensors that take memory only where they are read, the words, and that memory.

    Raises:
        CorruptFileError: truncated, altered, unreadable, or not written by us.
    """
    try:
        with path.open("rb", buffering=0) as file:
            words, entries = _read_header(file)
            claimed = words.pop(_DIGEST, None)
            if claimed is None:
                raise CorruptFileError("it has no digest: not written by xpeer")
            if _digest(entries, words) != claimed:
                raise CorruptFileError("its content does not match its digest")
            pages = Pages(file)
    except (
        OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError,
    ) as e:  # fmt: skip
        raise CorruptFileError(" ".join(str(e).split()) or type(e).__name__) from e
    return {e.name: pages.tensor(e.begin, e.dtype, e.shape) for e in entries}, words, pages


def spill(tensors: Mapping[str, Pending], folder: Path) -> dict[str, torch.Tensor]:
    """Make tensors one after the other, and return them as pages of a file: the system takes these
    back where memory is short, and reads them again.

    The file has no name when this returns. Its room on the disk is free when no tensor is left.

    Args:
        tensors: together they may be larger than the memory; each one has to fit.
        folder: exists; on a disk, not in memory.

    Raises:
        OSError: the file can't be written.
    """
    if not tensors:
        return {}
    path = folder / f"{STAGING}tensors"
    try:
        save_file(tensors, path, words={}, on_progress=lambda _: None)
        with path.open("rb", buffering=0) as file:
            _, entries = _read_header(file)
            pages = Pages(file)
    finally:
        path.unlink(missing_ok=True)
    return {e.name: pages.tensor(e.begin, e.dtype, e.shape) for e in entries}


def _read_header(file: io.FileIO) -> tuple[dict[str, str], list[_Entry]]:
    """Read names, types, shapes and places, and check that they fit the file's size.

    Raises:
        CorruptFileError, ValueError, KeyError, TypeError, AttributeError: they do not.
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(_MAX_HEADER, size - 8):
        raise CorruptFileError(f"its header would have {length} bytes, the file has {size}")
    header: dict[str, Any] = json.loads(file.read(length))
    words = header.pop("__metadata__", {})
    if not all(isinstance(word, str) for word in words.values()):
        raise CorruptFileError("its metadata can't be read")
    entries, end = [], 8 + length
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        dtype, shape = _TYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
        begin, after = (8 + length + int(place) for place in entry["data_offsets"])
        if begin != end or min(shape, default=0) < 0:
            raise CorruptFileError(f"{name} is not where it should be")
        if after - begin != dtype.itemsize * math.prod(shape):
            raise CorruptFileError(f"{name} has {after - begin} bytes, wrong for its shape")
        entries.append(_Entry(name, dtype, shape, begin, after - begin, file))
        end = after
    if end != size:
        raise CorruptFileError(f"it has {size} bytes, and {end} belong to it")
    return words, entries


def clear_staging(folder: Path) -> None:
    """Remove what a crash in the middle of a write left. Call it only while nobody writes there."""
    for left in folder.glob(f"{STAGING}*"):
        shutil.rmtree(left, ignore_errors=True)


def save_file(
    tensors: Mapping[str, torch.Tensor | Pending],
    path: Path,
    *,
    words: Mapping[str, str],
    on_progress: Callable[[int], None],
) -> None:
    """Write a new file, mode 0600; it is on the disk when this returns."""
    # widest values first, so that all are aligned
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, object] = {"__metadata__": dict(words)}
    end = 0
    for name in names:
        tensor, begin = tensors[name], end
        end += tensor.nbytes
        header[name] = {
            "dtype": _KINDS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with open(os.open(path, flags, 0o600), "wb", buffering=0) as file:  # noqa: PTH123 - a mode
        _write_all(file, memoryview(len(head).to_bytes(8, "little") + head))
        done = synced = 0
        for name in names:
            for piece in _pieces(tensors[name]):
                _write_all(file, piece)
                done += len(piece)
                del piece  # or its tensor would be there until the next one is made
                if done - synced >= _PIECE:
                    os.fdatasync(file.fileno())
                    synced = done
                    on_progress(done)
        os.fsync(file.fileno())


def _write_all(file: io.RawIOBase, data: memoryview) -> None:
    while data:
        data = data[file.write(data) or 0 :]


def _pieces(tensor: torch.Tensor | Pending) -> Iterator[memoryview]:
    """The tensor's bytes, at most `_PIECE` at a time."""
    made = tensor.make() if isinstance(tensor, Pending) else tensor
    if made.shape != tensor.shape:
        raise ValueError(f"a tensor of {tuple(made.shape)}, and {tuple(tensor.shape)} was due")
    flat = made.detach().contiguous().view(-1)
    for part in torch.split(flat, _PIECE // tensor.dtype.itemsize) if len(flat) else ():
        yield part.to("cpu", tensor.dtype).view(torch.uint8).numpy().data


class _Entry:
    """A tensor to be hashed: in memory, or in a file."""

    def __init__(
        self,
        name: str,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        begin: int,
        size: int,
        source: io.FileIO | torch.Tensor,
    ) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape
        self.begin, self.size = begin, size  # bytes
        self._source = source

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> _Entry:
        return cls(name, tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes, tensor)

    def pieces(self) -> Iterator[memoryview]:
        """The bytes, at most `_PIECE` at a time."""
        if isinstance(self._source, torch.Tensor):
            yield from _pieces(self._source)
            return
        self._source.seek(self.begin)
        buffer, left = memoryview(bytearray(min(_PIECE, self.size))), self.size
        while left:
            got = self._source.readinto(buffer[: min(len(buffer), left)]) or 0
            if not got:
                raise CorruptFileError("it ends too early")
            yield buffer[:got]
            left -= got


def _digest(
    tensors: Iterable[_Entry],
    words: Mapping[str, str],
    on_progress: Callable[[int], None] = lambda _done: None,
) -> str:
    digest, done = hashlib.blake2b(digest_size=32), 0
    for key in sorted(words):
        _absorb(digest, key.encode())
        _absorb(digest, words[key].encode())
    for tensor in sorted(tensors, key=lambda entry: entry.name):
        _absorb(digest, f"{tensor.name} {tensor.dtype} {tensor.shape}".encode())
        if tensor.size:
            digest.update(tensor.size.to_bytes(8, "little"))
            for piece in tensor.pieces():
                digest.update(piece)
                done += len(piece)
                on_progress(done)
    return digest.hexdigest()


def _absorb(digest: hashlib.blake2b, part: bytes | memoryview) -> None:
    digest.update(len(part).to_bytes(8, "little"))
    digest.update(part)
