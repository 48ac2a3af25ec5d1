"""Kinds of files, by their names: which are read, and which are refused. Opens no file."""

from __future__ import annotations

from pathlib import Path
from typing import Final

READ_IN_FOLDERS: Final = (".txt", ".md", ".jsonl", ".parquet", ".csv")
"""Suffixes of the files that are read in folders; all but .parquet may be packed."""
PACKED: Final = (".gz", ".zst")
_SAVED: Final = "state.json"
"""Lies beside the .arrow files that `datasets` saved, and not beside those of its cache."""

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


def is_read_in_folders(path: Path) -> bool:
    """Whether a file of this name is read if its folder is named."""
    kind = kind_of(path)
    if path.suffix.lower() in PACKED:
        return kind in READ_IN_FOLDERS and not refusal(path)
    if kind == ".arrow":
        return not path.name.startswith("cache-") and (path.parent / _SAVED).exists()
    return kind in READ_IN_FOLDERS


def refusal(path: Path) -> str:
    """The remedy for a file that is not read because of its name; empty = it is read."""
    kind = kind_of(path)
    if path.suffix.lower() in PACKED and kind in (".parquet", ".tar", ".arrow"):
        return f"{_UNPACK}; of packed files only single texts are read"
    return _REFUSED.get(kind, "")
