"""Private text from files, as documents. Knows no tokens; no text gets into an error or a log.

.txt, .md            one document per file
.jsonl, .parquet     one document per row, in the field `data.text_field`
any other text file  one document, when it is named, or matched by a glob that is not a folder's
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from xpeer.errors import ShardError
from xpeer.identity import blake2b
from xpeer.paths import refuse_homes

SUFFIXES: Final = (".txt", ".md", ".jsonl", ".parquet")
"""What is looked for in folders."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text. Records are never cut across two."""

    id: str
    """BLAKE2b-128 of the text, hex: the same wherever the text lies."""
    text: str
    source: str
    """The file it came from."""
    begins: bool = True
    ends: bool = True
    """Whether it does so with the document that it is, or is a piece of."""
    whole: str = ""
    """Id of the document that it is a piece of; empty = it is one itself."""

    def __repr__(self) -> str:
        """Never the text."""
        return f"Document({self.id}, {len(self.text)} characters, {self.source!r})"


def document_of(text: str, source: str) -> Document:
    """Name a text by its content."""
    return Document(blake2b(text.encode(), size=16).hex(), text, source)


def load_documents(
    patterns: Sequence[str], text_field: str = "text", setting: str = "data.shard"
) -> list[Document]:
    """Read all text that some files, folders or globs hold.

    Texts without a visible character are left out; of equal texts the first is kept. Files come in
    the order of the patterns, then by path.

    Args:
        patterns: ~ is expanded; folders are searched recursively, hidden entries left out.
        text_field: of .jsonl and .parquet rows.
        setting: named in errors.

    Raises:
        ShardError: nothing matches, no text, or a file can't be read; names file, line or byte.
    """
    found: dict[str, Document] = {}
    for path in _files(patterns, setting):
        for text in _texts(path, text_field):
            if text.strip():
                document = document_of(text, str(path))
                found.setdefault(document.id, document)
    if not found:
        raise _no_text(patterns, setting)
    return list(found.values())


def corpus_digest(documents: Iterable[Document]) -> str:
    """BLAKE2b-256 (hex) of a corpus: of its documents' names, whatever files they lie in."""
    return blake2b(b"corpus", *sorted(document.id.encode() for document in documents)).hex()


def require_text(patterns: Sequence[str], text_field: str, setting: str) -> None:
    """Read until the first text; cheap even for a large shard.

    Raises:
        ShardError: as `load_documents`, for what was read so far.
    """
    for path in _files(patterns, setting):
        if any(text.strip() for text in _texts(path, text_field)):
            return
    raise _no_text(patterns, setting)


def _no_text(patterns: Sequence[str], setting: str) -> ShardError:
    return ShardError(
        f"{setting}: no text in {', '.join(patterns)}", "name files that hold some text"
    )


def _files(patterns: Sequence[str], setting: str) -> Iterator[Path]:
    if not patterns:
        raise ShardError(f"{setting} is empty", "name files, folders or globs that hold text")
    seen: set[Path] = set()
    for pattern in patterns:
        for path in _matches(pattern, setting):
            real = path.resolve()
            if real not in seen:
                seen.add(real)
                yield path


def _matches(pattern: str, setting: str) -> list[Path]:
    named = Path(pattern).expanduser()
    try:
        if named.exists():
            matched = [named]
        else:
            found = glob.glob(str(named), recursive=True)  # noqa: PTH207 - Path.glob refuses "/..."
            matched = [Path(path) for path in sorted(found)]
        files = [file for path in matched for file in _inside(path)]
    except OSError as e:
        raise ShardError(
            f"{setting}: {pattern} can't be searched: {e}", "check its owner and mode"
        ) from e
    if not matched:
        raise ShardError(
            f"{setting}: {pattern} matches no file (looked from {Path.cwd()})",
            "correct it; relative paths start at the folder the node was started in",
        )
    if not files:
        raise ShardError(
            f"{setting}: {pattern} holds no file of {', '.join(SUFFIXES)}",
            "other text files are read when they are named or matched by a glob",
        )
    refuse_homes(files, setting)
    return files


def _inside(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path] if path.is_file() else []  # a pipe would block for ever
    inside = []
    for folder, folders, names in os.walk(path, onerror=_raise):
        folders[:] = (name for name in folders if not name.startswith("."))
        inside += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(file for file in inside if file.suffix.lower() in SUFFIXES and file.is_file())


def _raise(error: OSError) -> None:
    raise error


def _texts(path: Path, text_field: str) -> Iterator[str]:
    suffix = path.suffix.lower()
    try:
        if suffix == ".jsonl":
            yield from _json_lines(path, text_field)
        elif suffix == ".parquet":
            yield from _parquet(path, text_field)
        else:
            yield _decode(path.read_bytes(), path).removeprefix("\ufeff")
    except OSError as e:
        raise ShardError(
            f"{path} can't be read: {e.strerror or e}", "check its owner and mode"
        ) from e


def _decode(data: bytes, path: Path, offset: int = 0) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        raise ShardError(
            f"{path}: byte {offset + e.start} is not UTF-8 ({e.reason})",
            "convert the file to UTF-8, or leave it out",
        ) from e


def _json_lines(path: Path, text_field: str) -> Iterator[str]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = _decode(line, path, offset)
            offset += len(line)
            if text.strip():
                yield _field(text, text_field, f"{path}:{number}")


def _field(line: str, text_field: str, where: str) -> str:
    try:
        row = json.loads(line.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as e:
        raise ShardError(f"{where}: not valid JSON", "correct that line") from e
    if not isinstance(row, dict):
        raise ShardError(f"{where}: not a JSON object", "each line must be one object")
    if text_field not in row:
        raise ShardError(
            f"{where}: no field {text_field!r} (fields: {', '.join(sorted(row)) or 'none'})",
            "set data.text_field to the field that holds the text",
        )
    text = row[text_field]
    if not isinstance(text, str):
        raise ShardError(
            f"{where}: field {text_field!r} is no text but {type(text).__name__}",
            "set data.text_field to the field that holds the text",
        )
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise ShardError(
            f"{where}: field {text_field!r} has half a surrogate pair at character {e.start}",
            "correct that escape",
        ) from e
    return text


def _parquet(path: Path, text_field: str) -> Iterator[str]:
    try:
        import pyarrow as pa  # noqa: PLC0415 - an extra
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as e:
        raise ShardError(
            f"{path}: reading .parquet needs pyarrow", "pip install 'xpeer[parquet]'"
        ) from e
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if text_field not in schema.names:
                raise ShardError(
                    f"{path}: no column {text_field!r} (columns: {', '.join(schema.names)})",
                    "set data.text_field to the column that holds the text",
                )
            kind: Any = schema.field(text_field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise ShardError(
                    f"{path}: column {text_field!r} is no text but {kind}",
                    "set data.text_field to the column that holds the text",
                )
            for batch in file.iter_batches(columns=[text_field]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (pa.ArrowException, UnicodeDecodeError) as e:
        raise ShardError(f"{path} is damaged: {e}", "restore the file") from e
