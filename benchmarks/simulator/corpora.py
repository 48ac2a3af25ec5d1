"""One kind of text per peer, as unlike one another as clouds get, from what is installed here.

Nothing is downloaded and nothing committed: results carry a digest of the bytes instead. The first
four kinds come with this project's dependencies; the others from wherever they are found, the next
kind in the list taking the place of one that is missing.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch

from xpeer.cli.demo import corpora as demo

TRAIN_BYTES: Final = 2_500_000
"""At most, of one kind."""
LEAST_BYTES: Final = 300_000
"""A kind with less text than this, or too little held out, is missing."""
LEAST_HELD_OUT_BYTES: Final = 40_000
HELD_OUT_ONE_IN: Final = demo.HELD_OUT_ONE_IN
HELD_OUT_WINDOWS: Final = 128
"""Of each kind, in each of the two held-out sets."""

_SITE: Final = Path(sysconfig.get_paths()["purelib"])
_FILES: Final[dict[str, tuple[tuple[Path, str], ...]]] = {
    "troff": ((Path("/usr/share/man"), "man[1-8]/*.gz"),),
    "perl": ((Path("/usr/share/perl"), "**/*.p[lm]"), (Path("/usr/share/perl5"), "**/*.pm")),
    "stubs": ((_SITE, "**/*.pyi"),),
    "c": ((Path("/usr/include/linux"), "**/*.h"), (Path("/usr/include"), "*.h")),
    "shell": ((Path("/usr/share/bash-completion"), "**/*"), (Path("/etc/init.d"), "*")),
    "cmake": ((_SITE, "**/*.cmake"), (Path("/usr/share"), "cmake*/Modules/*.cmake")),
    "fortran": ((_SITE, "**/*.f90"), (_SITE, "**/*.pyx")),
}
KINDS: Final = ("manual", "python", "headers", "licences", *_FILES)


@dataclass(frozen=True)
class Corpus:
    """Bytes of one kind; held-out files are never in `train`."""

    kind: str
    train: torch.Tensor
    """(bytes,) uint8."""
    held_out: torch.Tensor
    """(bytes,) uint8."""
    digest: str
    """BLAKE2b-64 (hex) of both."""


@functools.cache
def collect(count: int) -> tuple[Corpus, ...]:
    """The first kinds that are found here, the same bytes at every call on one machine.

    Raises:
        LookupError: fewer than `count` kinds have enough text.
    """
    found: list[Corpus] = []
    for kind in KINDS:
        if len(found) == count:
            break
        corpus = _corpus(kind)
        enough = corpus.held_out.numel() >= LEAST_HELD_OUT_BYTES
        if enough and corpus.train.numel() >= LEAST_BYTES:
            found.append(corpus)
    if len(found) < count:
        names = ", ".join(corpus.kind for corpus in found)
        raise LookupError(f"only {len(found)} of {count} kinds of text were found: {names}")
    return tuple(found)


def digest(corpora: tuple[Corpus, ...]) -> str:
    """One digest for all of them, in order."""
    return hashlib.blake2b("".join(c.digest for c in corpora).encode(), digest_size=8).hexdigest()


def held_out(corpora: tuple[Corpus, ...], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two disjoint sets of windows, every kind equally often: one to tune by, one to report.

    Args:
        corpora: of the peers.
        length: of a window, bytes.

    Returns:
        Both (kinds * HELD_OUT_WINDOWS, length) int64.
    """
    tuning, report = [], []
    for corpus in corpora:
        whole = corpus.held_out.numel() // length
        windows = corpus.held_out[: whole * length].view(whole, length).long()
        picked = torch.linspace(0, whole - 1, 2 * HELD_OUT_WINDOWS).long()
        tuning.append(windows[picked[0::2]])
        report.append(windows[picked[1::2]])
    return torch.cat(tuning), torch.cat(report)


def _corpus(kind: str) -> Corpus:
    if kind in demo.LABELS:
        collected = demo.collect(kind, TRAIN_BYTES)
        train, kept = "".join(collected.texts), "".join(collected.held_out)
    else:
        train, kept = _split(lambda: _texts(kind))
    one, other = train.encode(), kept.encode()
    return Corpus(
        kind,
        torch.from_numpy(np.frombuffer(one, dtype=np.uint8).copy()),
        torch.from_numpy(np.frombuffer(other, dtype=np.uint8).copy()),
        hashlib.blake2b(one + b"\0" + other, digest_size=8).hexdigest(),
    )


def _split(source: Callable[[], Iterator[str]]) -> tuple[str, str]:
    """Whole files in an order drawn by their digests, each once."""
    unique = {hashlib.blake2b(text.encode()).digest(): text for text in source()}
    train: list[str] = []
    kept: list[str] = []
    size = 0
    for key, text in sorted(unique.items()):
        if int.from_bytes(key[-4:], "big") % HELD_OUT_ONE_IN == 0:
            kept.append(text)
        else:
            train.append(text)
            size += len(text)
        if size >= TRAIN_BYTES:
            break
    return "".join(train), "".join(kept)


def _texts(kind: str) -> Iterator[str]:
    for root, pattern in _FILES[kind]:
        for path in sorted(root.glob(pattern)):
            text = _read(path)
            if text is not None:
                yield text


def _read(path: Path) -> str | None:
    try:
        if not path.is_file() or not path.stat().st_size <= demo.MAX_FILE_BYTES:
            return None
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode()
    except (OSError, EOFError, UnicodeDecodeError):
        return None
    return text if len(text) >= demo.MIN_FILE_BYTES else None
