"""About how many bytes the text takes on the disk as tokens, before it was read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from xpeer.config import NodeConfig
from xpeer.errors import ConfigError
from xpeer.manifest import Manifest
from xpeer.manifest.model import vocabulary_of
from xpeer.training.files import find
from xpeer.training.formats.examples import asks_for_examples, fields_of
from xpeer.training.formats.parquet import FAULTS
from xpeer.training.kinds import PACKED, kind_of
from xpeer.training.token_cache import type_of_tokens
from xpeer.training.tokenizer import BYTE_VOCABULARY

_BYTES_A_TOKEN: Final = 4
"""Of text. English in a large vocabulary has a little more."""
_PACKED: Final = 4
"""How much smaller packed text is, at most for what people write."""


def bytes_of_tokens(manifest: Manifest, config: NodeConfig, length: Callable[[Path], int]) -> int:
    """About how many bytes the tokens of a node's text take.

    Args:
        manifest: of the swarm.
        config: of the node.
        length: says how many bytes a file has.
    """
    try:
        files = find(config.data.corpus or config.data.shard, "data.shard").sources
    except ConfigError:  # the trainer says what is wrong with it
        return 0
    field = config.data.text_field
    text = sum(_text_bytes(file.path, field, length) for file in files)
    is_bytes = manifest.tokenizer.kind == "byte"
    vocabulary = BYTE_VOCABULARY if is_bytes else vocabulary_of(manifest.model.config)
    kind = type_of_tokens(vocabulary or 1 << 16, examples=asks_for_examples(field))
    return text * kind.itemsize // (1 if is_bytes else _BYTES_A_TOKEN)


def _text_bytes(path: Path, field: str, length: Callable[[Path], int]) -> int:
    """About how many bytes the text of a file has, unpacked."""
    packed = path.suffix.lower() in PACKED
    if kind_of(path) != ".parquet":
        return length(path) * (_PACKED if packed else 1)
    return _column_bytes(path, field) or length(path) * _PACKED


def _column_bytes(path: Path, field: str) -> int:
    """Bytes of the columns that are read of a Parquet table, unpacked. Reads its footer.

    0 if it can't be read: the trainer says what is wrong with it.
    """
    try:
        import pyarrow as pa  # noqa: PLC0415 - slow
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError:
        return 0
    names, found = fields_of(field), 0
    try:
        with path.open("rb") as source:
            metadata = parquet.read_metadata(source)
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            for number in range(group.num_columns):
                column = group.column(number)
                if column.path_in_schema.partition(".")[0] in names:
                    found += column.total_uncompressed_size
    except (pa.ArrowException, *FAULTS):
        return 0
    return found
