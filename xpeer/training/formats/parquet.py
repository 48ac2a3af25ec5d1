"""Parquet tables, read with pyarrow."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from xpeer.errors import ShardError
from xpeer.training.formats.examples import Example, asks_for_examples, fields_of, taken
from xpeer.training.formats.packed import RATIO_MAX, UNPACKED_FREE
from xpeer.training.formats.rows import CHATS, Rows

_BATCH_ROWS: Final = 1024
_BATCH_BYTES: Final = 32 << 20
"""About so many bytes of rows are in memory at once, but at least one row."""
_READ_BYTES: Final = 1 << 20
FAULTS: Final = (OSError, ValueError, LookupError, ArithmeticError, RuntimeError, TypeError)
"""What pyarrow raises besides its own errors for tables that are damaged, and for values that
Python does not have, such as days before its calendar."""


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
            options = {
                "metadata": metadata,
                "page_checksum_verification": True,
                # else all of a column in a group of rows is read at once
                "buffer_size": _READ_BYTES,
                "pre_buffer": False,
            }
            repeated = [name for name in fields_of(rows.field) if name in leaves]
            with (
                parquet.ParquetFile(source, **options) as plain,
                parquet.ParquetFile(source, read_dictionary=repeated, **options) as repeating,
            ):
                names = columns_of(plain.schema_arrow, rows, pa.types)
                for name in names:
                    _refuse_bomb(metadata, name, path)
                readers = _Readers(plain, repeating, repeated)
                yield from values_of(readers.batches(names), names, rows)
        except pa.ArrowNotImplementedError as e:
            raise ShardError(
                f"{path} can't be read by this pyarrow ({pa.__version__}): {in_one_line(e)}",
                "write it with another compression or encoding, or update pyarrow",
            ) from e
        except (pa.ArrowException, *FAULTS) as e:
            if isinstance(e, OSError) and e.errno:
                raise
            raise ShardError(
                f"{path} is damaged, or no Parquet file: {in_one_line(e)}",
                "restore the file, or leave it out",
            ) from e


@dataclass(frozen=True, slots=True)
class _Readers:
    """Two ways to read one file.

    As dictionaries, since few bytes of a file may repeat a long text a million times. But then all
    values of a group of rows stay in memory; so groups with many bytes are read value by value.
    """

    plain: Any
    repeating: Any
    repeated: list[str]
    """The columns that the second way concerns."""

    def batches(self, names: list[str]) -> Iterator[Any]:
        """Read all rows. No batch is much larger than `_BATCH_BYTES`, but by one row or page."""
        groups = range(self.plain.metadata.num_row_groups)
        for (repeats, size), alike in itertools.groupby(groups, lambda n: self._way(n, names)):
            file = self.repeating if repeats else self.plain
            yield from file.iter_batches(batch_size=size, row_groups=list(alike), columns=names)

    def _way(self, number: int, names: list[str]) -> tuple[bool, int]:
        """Whether to read a group as dictionaries, and how many rows at once."""
        group = self.plain.metadata.row_group(number)
        columns = [group.column(n) for n in range(group.num_columns)]
        columns = [column for column in columns if _column(column) in names]
        size = sum(column.total_uncompressed_size for column in columns)
        repeats = any(column.has_dictionary_page for column in columns)
        if repeats and size <= _BATCH_BYTES:
            return True, _BATCH_ROWS
        most = _BATCH_BYTES * group.num_rows // max(1, size)
        if repeats and self.repeated:
            most = min(most, _BATCH_BYTES // self._longest(number))
        most = max(1, min(_BATCH_ROWS, most))
        return False, 1 << (most.bit_length() - 1)  # so that more groups are read together

    def _longest(self, number: int) -> int:
        """A size, in bytes, that no value which a group repeats is above."""
        few = self.repeating.iter_batches(batch_size=1, row_groups=[number], columns=self.repeated)
        columns = next(few).columns  # bytes of a fixed size are never dictionaries
        sizes = (int(getattr(column, "dictionary", column).nbytes) for column in columns)
        return max(1, *sizes)


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
            problem = f"{rows.path}: column {name!r} is no text but {kind}"
            if _is_list(kind, types):
                raise ShardError(problem, CHATS)
            raise ShardError(problem, "set data.text_field to the column that holds the text")
    return list(wanted)


def values_of(batches: Iterable[Any], names: list[str], rows: Rows) -> Iterator[str | Example]:
    """Read the texts of a table's rows, or their examples, batch by batch."""
    cells = itertools.chain.from_iterable(_cells(batch, names) for batch in batches)
    for number, scalars in enumerate(cells, start=1):
        where = f"{rows.path}: row {number}"
        value = taken([value_of(scalar, where) for scalar in scalars], rows)
        if value is not None:
            yield value


def _cells(batch: Any, names: list[str]) -> Iterator[tuple[Any, ...]]:
    columns = [batch.column(batch.schema.get_field_index(name)) for name in names]
    return zip(*columns, strict=True)


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


def _is_list(kind: Any, types: Any) -> bool:
    tests = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view)
    return any(test(kind) for test in tests) or types.is_large_list_view(kind)


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
