"""Kinds of files, by their names: which are read, and which are refused.

Opens no file with text: only the list of those that `datasets` saved.
"""

from __future__ import annotations

import functools
import json
import stat
from pathlib import Path
from typing import Final

READ_IN_FOLDERS: Final = (".txt", ".md", ".jsonl", ".parquet", ".csv")
"""Suffixes of the files that are read in folders; all but .parquet may be packed."""
PACKED: Final = (".gz", ".zst")
_TABLES: Final = frozenset({".jsonl", ".ndjson", ".parquet", ".arrow", ".csv", ".tsv"})
_SAVED: Final = "state.json"
"""Lies beside the .arrow files that `datasets` saved, and not beside those of its cache. It names
them: others there were left by an earlier save of more files."""
_MOST_BYTES: Final = 64 << 20

_UNPACK = "unpack it"
_REFUSED: Final = {
    **dict.fromkeys(
        (".html", ".htm", ".xhtml", ".xml", ".svg"),
        "it is mark-up, whose tags would be trained on: convert it to text",
    ),
    **dict.fromkeys(
        (".pdf", ".docx", ".doc", ".odt", ".rtf", ".epub", ".pptx", ".xlsx"),
        "convert it to .txt or .md, e.g. with pandoc or pdftotext",
    ),
    **dict.fromkeys(
        (".zip", ".tar", ".tgz", ".7z", ".rar", ".bz2", ".xz", ".lz4"),
        f"{_UNPACK}; of packed files only .gz and .zst are read",
    ),
    ".json": "make it one object a line and call it .jsonl, e.g. jq -c '.[]' FILE > FILE.jsonl",
    ".ipynb": "convert it to .md, e.g. with jupyter nbconvert",
    ".feather": "write it as .parquet",
}


def kind_of(path: Path) -> str:
    """The suffix that says what a file holds, in small letters; packing does not count."""
    kinds = [suffix.lower() for suffix in path.suffixes[-2:]]
    if kinds[-1:] and kinds[-1] in PACKED:
        kinds = kinds[:-1]
    return kinds[-1] if kinds else ""


def is_table(path: Path) -> bool:
    """Whether a file of this name has rows with fields."""
    return kind_of(path) in _TABLES


def is_read_in_folders(path: Path) -> bool:
    """Whether a file of this name is read if its folder is named."""
    kind = kind_of(path)
    if path.suffix.lower() in PACKED:
        return kind in READ_IN_FOLDERS and not refusal(path)
    if kind == ".arrow":
        return path.name in _saved(path.parent)
    return kind in READ_IN_FOLDERS


def _saved(folder: Path) -> frozenset[str]:
    """Names of the files that `datasets` saved in a folder.

    Raises:
        OSError: its list can't be read.
    """
    try:
        status = (folder / _SAVED).stat()
    except FileNotFoundError:
        return frozenset()
    if not stat.S_ISREG(status.st_mode):
        return frozenset()
    return _listed(folder / _SAVED, status.st_mtime_ns, status.st_ino)


@functools.lru_cache(maxsize=8)
def _listed(path: Path, _written_ns: int, _inode: int) -> frozenset[str]:
    with path.open("rb") as file:
        data = file.read(_MOST_BYTES)
    try:
        return frozenset(each["filename"] for each in json.loads(data)["_data_files"])
    except (ValueError, LookupError, TypeError, RecursionError):  # another program's
        return frozenset()


def refusal(path: Path) -> str:
    """The remedy for a file that is not read because of its name; empty = it is read."""
    kind = kind_of(path)
    if path.suffix.lower() in PACKED and kind in (".parquet", ".tar", ".arrow"):
        return f"{_UNPACK}; of packed files only single texts are read"
    return _REFUSED.get(kind, "")
