"""Real text from the installed environment, of four very different kinds.

Nothing is downloaded. One kind is the public text, three are private shards. Whole files are held
out for the report, and no daemon sees them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PUBLIC = "manual"
PRIVATE = ("python", "headers", "licences")
LABELS = {
    "manual": "Python manual topics (prose)",
    "python": "Python source (standard library, transformers)",
    "headers": "C++ headers (torch)",
    "licences": "package descriptions and licences",
}
MIN_FILE_BYTES = 1_000
MAX_FILE_BYTES = 60_000
HELD_OUT_ONE_IN = 12


@dataclass(frozen=True)
class Corpus:
    """Texts of one kind; held-out files are never in `texts`."""

    kind: str
    texts: list[str]
    held_out: list[str]


def collect(kind: str, max_bytes: int) -> Corpus:
    """Read a kind of text. In one environment each call gives the same files in the same order.

    Args:
        kind: a key of LABELS.
        max_bytes: about the size of `texts`. Held-out text comes on top, a twelfth of it.
    """
    texts: list[str] = []
    held_out: list[str] = []
    size = 0
    for text in _distinct(kind):
        number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")
        if number % HELD_OUT_ONE_IN == 0:
            held_out.append(text)
        else:
            texts.append(text)
            size += len(text)
        if size >= max_bytes:
            break
    return Corpus(kind, texts, held_out)


def _distinct(kind: str) -> Iterator[str]:
    """Texts of a kind in a fixed random order, each once."""
    source = {
        "manual": _manual,
        "python": _python,
        "headers": _headers,
        "licences": _licences,
    }[kind]
    unique = {hashlib.blake2b(text.encode()).digest(): text for text in source()}
    for _, text in sorted(unique.items()):
        yield text


def _manual() -> Iterator[str]:
    from pydoc_data import topics  # noqa: PLC0415 - half a megabyte, wanted here only

    yield from (text for _, text in sorted(topics.topics.items()) if len(text) >= MIN_FILE_BYTES)


def _python() -> Iterator[str]:
    yield from _files(Path(sysconfig.get_paths()["stdlib"]), "*.py", "*/*.py")
    yield from _files(_package("transformers"), "models/*/modeling_*.py")


def _headers() -> Iterator[str]:
    yield from _files(_package("torch") / "include", "**/*.h", "**/*.hpp")


def _licences() -> Iterator[str]:
    # Only of this environment: the path may have other packages.
    for distribution in importlib.metadata.distributions(path=[sysconfig.get_paths()["purelib"]]):
        for file in distribution.files or []:
            name = file.name.upper()
            if name == "METADATA" or name.startswith(("LICEN", "NOTICE", "README")):
                text = _read(Path(str(distribution.locate_file(file))))
                if text is not None:
                    yield text


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(name)
    return Path(spec.origin).parent


def _files(root: Path, *patterns: str) -> Iterator[str]:
    for pattern in patterns:
        for path in sorted(root.glob(pattern)):
            if "site-packages" in path.relative_to(root).parts:
                continue
            text = _read(path)
            if text is not None:
                yield text


def _read(path: Path) -> str | None:
    try:
        if not path.is_file() or not MIN_FILE_BYTES <= path.stat().st_size <= MAX_FILE_BYTES:
            return None
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
