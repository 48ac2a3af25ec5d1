"""Tables that `datasets` saved (`save_to_disk`): Arrow's streams, and its files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from xpeer.errors import ShardError
from xpeer.training.formats.examples import Example
from xpeer.training.formats.parquet import FAULTS, columns_of, in_one_line, values_of
from xpeer.training.formats.rows import Rows


def texts(path: Path, rows: Rows) -> Iterator[str | Example]:
    """Read the texts of a table's rows, batch by batch. One that is packed is in memory as a whole.

    Raises:
        ShardError: pyarrow is missing, the file is damaged, or there is not one such column with
            text.
        OSError: the file can't be read.
    """
    try:
        import pyarrow as pa  # noqa: PLC0415 - slow
        from pyarrow import ipc  # noqa: PLC0415
    except ImportError as e:
        raise ShardError(f"{path}: reading .arrow needs pyarrow", "pip install pyarrow") from e
    try:
        # mapped, as `datasets` does: a batch of it may be larger than memory
        with pa.memory_map(os.fsencode(path)) as source:
            schema, batches = _opened(source, ipc, pa)
            yield from values_of(batches, columns_of(schema, rows, pa.types), rows)
    except (pa.ArrowException, *FAULTS) as e:
        if isinstance(e, OSError) and e.errno:
            raise
        raise ShardError(
            f"{path} is damaged, or no Arrow table: {in_one_line(e)}",
            "restore the file, or leave it out",
        ) from e


def _opened(source: Any, ipc: Any, pa: Any) -> tuple[Any, Iterable[Any]]:
    """Schema and batches of a stream, as `datasets` writes them, or else of a file."""
    try:
        stream = ipc.open_stream(source)
    except pa.ArrowInvalid:
        source.seek(0)
        file = ipc.open_file(source)
        return file.schema, map(file.get_batch, range(file.num_record_batches))
    return stream.schema, stream
