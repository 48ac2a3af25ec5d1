"""Parquet tables, read with pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from xpeer.errors import ShardError
from xpeer.training.formats.examples import Example, asks_for_examples, fields_of, taken
from xpeer.training.formats.packed import RATIO_MAX, UNPACKED_FREE
from xpeer.training.formats.rows import Rows

_BATCH_ROWS: Final = 1024


def texts(path: Path, rows: Rows) -> Iterator[str | Example]:
    """Read the texts of a table's rows: any of Arrow's types of text, or bytes that are UTF-8.

    Raises:
        ShardError: pyarrow is missing, the file is damaged, or there is not one such column with
            text.
        OSError: the file can't be read.
    """
    try:
        import pyarrow as pa  # noqa: PLC0415 - slow
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as e:
        raise ShardError(f"{path}: reading .parquet needs pyarrow", "pip install pyarrow") from e
    with path.open("rb") as source:
        try:
            metadata = parquet.read_metadata(source)
            leaves = {metadata.schema.column(n).path for n in range(metadata.num_columns)}
            # Read as a dictionary: few bytes of a file may repeat a long text a million times.
            with parquet.ParquetFile(
                source,
                metadata=metadata,
                page_checksum_verification=True,
                read_dictionary=[name for name in fields_of(rows.field) if name in leaves],
            ) as file:
                yield from _rows(file, rows, pa.types)
        except pa.ArrowNotImplementedError as e:
            raise ShardError(
                f"{path} can't be read by this pyarrow ({pa.__version__}): {in_one_line(e)}",
                "write it with another compression or encoding, or update pyarrow",
            ) from e
        except (pa.ArrowException, OSError, ValueError, KeyError, RuntimeError) as e:
            if isinstance(e, OSError) and e.errno:
                raise
            raise ShardError(
                f"{path} is damaged, or no Parquet file: {in_one_line(e)}",
                "restore the file, or leave it out",
            ) from e


def _rows(file: Any, rows: Rows, types: Any) -> Iterator[str | Example]:
    names = columns_of(file.schema_arrow, rows, types)
    for name in names:
        _refuse_bomb(file.metadata, name, rows.path)
    number = 0
    for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=names):
        yield from values_of(batch, names, rows, number)
        number += batch.num_rows


def columns_of(schema: Any, rows: Rows, types: Any) -> list[str]:
    """The names of the columns that hold the text, or the examples.

    Raises:
        ShardError: there is none, there are several of a name, or one that holds no text.
    """
    names, wanted = schema.names, fields_of(rows.field)
    for name in wanted:
        if name not in names:
            raise ShardError(
                f"{rows.path}: no column {name!r} (columns: {', '.join(names) or 'none'})",
                "set data.text_field to the column that holds the text",
            )
        if names.count(name) > 1:
            raise ShardError(
                f"{rows.path} has {names.count(name)} columns named {name!r}", "rename all but one"
            )
        kind = schema.field(name).type
        # a column of examples may also hold messages; rows that are none are counted
        if not (asks_for_examples(rows.field) or _is_text(kind, types)):
            raise ShardError(
                f"{rows.path}: column {name!r} is no text but {kind}",
                "set data.text_field to the column that holds the text",
            )
    return list(wanted)


def values_of(batch: Any, names: list[str], rows: Rows, before: int) -> Iterator[str | Example]:
    """Read the texts of some rows, or their examples. `before` is the number of rows above."""
    columns = [batch.column(batch.schema.get_field_index(name)) for name in names]
    for number, scalars in enumerate(zip(*columns, strict=True), start=before + 1):
        where = f"{rows.path}: row {number}"
        value = taken([value_of(scalar, where) for scalar in scalars], rows)
        if value is not None:
            yield value


def _refuse_bomb(metadata: Any, name: str, path: Path) -> None:
    """Refuse a column that its file's footer says unpacks to far too much."""
    columns = (
        group.column(number)
        for group in map(metadata.row_group, range(metadata.num_row_groups))
        for number in range(group.num_columns)
    )
    size = sum(c.total_uncompressed_size for c in columns if _column(c) == name)
    if size > max(UNPACKED_FREE, RATIO_MAX * path.stat().st_size):
        raise ShardError(
            f"{path}: column {name!r} unpacks to {size} bytes, more than {RATIO_MAX} times the "
            "file's size",
            "write it anew with another compression if that is meant",
        )


def _column(chunk: Any) -> str:
    """The column of a chunk, which may be of a part of it: messages.list.element.content."""
    return str(chunk.path_in_schema).partition(".")[0]


def _is_text(kind: Any, types: Any) -> bool:
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return _is_text(kind.value_type, types)
    if hasattr(kind, "storage_type"):  # an extension, e.g. arrow.json
        return _is_text(kind.storage_type, types)
    return any(
        test(kind)
        for test in (
            types.is_string, types.is_large_string, types.is_string_view, types.is_binary,
            types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary, types.is_null,
        )
    )  # fmt: skip


def value_of(scalar: Any, where: str) -> object:
    """The value of a cell; bytes as text.

    Raises:
        ShardError: bytes are not UTF-8.
    """
    try:
        value = scalar.as_py()
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as e:
        raise ShardError(
            f"{where}: byte {e.start} of the text is not UTF-8 ({e.reason})",
            "convert that column to UTF-8",
        ) from e


def in_one_line(error: BaseException) -> str:
    """The message of an error, short."""
    return " ".join(str(error).split())[:200] or type(error).__name__
