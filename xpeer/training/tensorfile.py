"""Tensors and a few words in one file that is either whole and verified, or not there.

safetensors checks sizes only; a digest over names, words and values is added to its metadata.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from xpeer.errors import LocalError

_STAGING: Final = ".writing-"
_DIGEST: Final = "digest"


class CorruptFileError(Exception):
    """A file is damaged, incomplete, or none of ours. Says how."""


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], words: Mapping[str, str]) -> str:
    """Write a file, mode 0600, in place of any that is there; durable when this returns.

    At a crash at any moment the old file, if any, is whole.

    Args:
        path: its folder is made, mode 0700, if need be.
        tensors: contiguous, CPU, not sharing memory.
        words: kept beside them.

    Returns:
        The digest, BLAKE2b-256 in hex.

    Raises:
        LocalError: disk full, no right to write.
    """
    staging: Path | None = None
    digest = _digest(tensors, words)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=path.parent))  # mode 0700
        beside = staging / path.name
        save_file(dict(tensors), beside, metadata={**words, _DIGEST: digest})
        beside.chmod(0o600)
        sync(beside)
        beside.replace(path)
        sync(path.parent)
    except (OSError, SafetensorError, RuntimeError) as e:
        # RuntimeError: torch's own writers raise it at a full disk
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
    """Remove what a crash in the middle of a write left. Only while nobody writes there."""
    for left in folder.glob(f"{_STAGING}*"):
        shutil.rmtree(left, ignore_errors=True)


def _digest(tensors: Mapping[str, torch.Tensor], words: Mapping[str, str]) -> str:
    digest = hashlib.blake2b(digest_size=32)
    for key in sorted(words):
        _absorb(digest, key.encode())
        _absorb(digest, words[key].encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        _absorb(digest, f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.numel():
            _absorb(digest, tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _absorb(digest: hashlib.blake2b, part: bytes | memoryview) -> None:
    digest.update(len(part).to_bytes(8, "little"))
    digest.update(part)


def sync(path: Path) -> None:
    """Have a file or folder on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
