"""Tensors and a few words in one file that is either whole and verified, or not there.

The format is safetensors'. Its metadata also holds a digest of names, words and values, since
safetensors checks sizes only. We write the file ourselves, in pieces. The writer of safetensors
copies everything first, holds up every other thread, and reports no progress.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open

from xpeer.errors import LocalError

_STAGING: Final = ".writing-"
_DIGEST: Final = "digest"
_PIECE: Final = 16 << 20
"""Bytes written between two syncs of the disk."""
_KINDS: Final = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip

OnProgress = Callable[[int, int], None]
"""Called with bytes done and bytes in all. Every byte counts twice: it is hashed, then written."""


def _ignore(_done: int, _total: int) -> None:
    """Ignore the progress."""


class CorruptFileError(Exception):
    """The file is damaged, incomplete, or not written by us. The message says which."""


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
    digest = _digest(tensors, words, lambda done: on_progress(done, 2 * size))
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=path.parent))  # mode 0700
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
        # RuntimeError: torch has no memory left for a copy
        raise LocalError(
            f"{path} can't be written: {e}", "check free space and rights on that disk"
        ) from e
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return digest


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read what `write_tensors` wrote; every bit of it is checked.

    Raises:
        CorruptFileError: truncated, altered, unreadable, or not written by us.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            words = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, RuntimeError, ValueError) as e:
        raise CorruptFileError(" ".join(str(e).split()) or type(e).__name__) from e
    claimed = words.pop(_DIGEST, None)
    if claimed is None:
        raise CorruptFileError("it has no digest: not written by xpeer")
    if _digest(tensors, words) != claimed:
        raise CorruptFileError("its content does not match its digest")
    return tensors, words


def clear_staging(folder: Path) -> None:
    """Remove what a crash in the middle of a write left. Call it only while nobody writes there."""
    for left in folder.glob(f"{_STAGING}*"):
        shutil.rmtree(left, ignore_errors=True)


def save_file(
    tensors: Mapping[str, torch.Tensor],
    path: Path,
    *,
    words: Mapping[str, str],
    on_progress: Callable[[int], None],
) -> None:
    """Write a new file, mode 0600; it is on the disk when this returns."""
    # widest values first, so that all are aligned
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
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
        for piece in (piece for name in names for piece in _pieces(tensors[name])):
            _write_all(file, piece)
            done += len(piece)
            if done - synced >= _PIECE:
                os.fdatasync(file.fileno())
                synced = done
                on_progress(done)
        os.fsync(file.fileno())


def _write_all(file: io.RawIOBase, data: memoryview) -> None:
    while data:
        data = data[file.write(data) or 0 :]


def _pieces(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The tensor's bytes, at most `_PIECE` at a time."""
    if tensor.numel():
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
        for begin in range(0, len(data), _PIECE):
            yield data[begin : begin + _PIECE]


def _digest(
    tensors: Mapping[str, torch.Tensor],
    words: Mapping[str, str],
    on_progress: Callable[[int], None] = lambda _done: None,
) -> str:
    digest, done = hashlib.blake2b(digest_size=32), 0
    for key in sorted(words):
        _absorb(digest, key.encode())
        _absorb(digest, words[key].encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        _absorb(digest, f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.nbytes.to_bytes(8, "little"))
            for piece in _pieces(tensor):
                digest.update(piece)
                done += len(piece)
                on_progress(done)
    return digest.hexdigest()


def _absorb(digest: hashlib.blake2b, part: bytes | memoryview) -> None:
    digest.update(len(part).to_bytes(8, "little"))
    digest.update(part)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk (fsync)."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
