"""Tables that `datasets` saved (`save_to_disk`): Arrow's streams, and its files."""

from __future__ import annotations

import os
from collections.abc import Iterator
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
            number = 0
            for batch in _batches(source, ipc, pa):
                names = columns_of(batch.schema, rows, pa.types)
                yield from values_of(batch, names, rows, number)
                number += batch.num_rows
    except (pa.ArrowException, *FAULTS) as e:
        if isinstance(e, OSError) and e.errno:
            raise
        raise ShardError(
            f"{path} is damaged, or no Arrow table: {in_one_line(e)}",
            "restore the file, or leave it out",
        ) from e


def _batches(source: Any, ipc: Any, pa: Any) -> Iterator[Any]:
    """Read a stream, as `datasets` writes them, or else a file."""
    try:
        stream = ipc.open_stream(source)
    except pa.ArrowInvalid:
        source.seek(0)
        file = ipc.open_file(source)
        for number in range(file.num_record_batches):
            yield file.get_batch(number)
        return
    yield from stream
