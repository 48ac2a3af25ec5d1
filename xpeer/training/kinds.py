"""Kinds of files, by their names: which are read, and which are refused. Opens no file."""

from __future__ import annotations

from pathlib import Path
from typing import Final

READ_IN_FOLDERS: Final = (".txt", ".md", ".jsonl", ".parquet")
"""Suffixes of the files that are read in folders."""

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
        (".zip", ".tar", ".tgz", ".7z", ".rar", ".bz2", ".xz", ".zst", ".lz4"),
        f"{_UNPACK}; of packed files only .gz is read",
    ),
    ".json": "make it one object a line and call it .jsonl, e.g. jq -c '.[]' FILE > FILE.jsonl",
    ".ipynb": "convert it to .md, e.g. with jupyter nbconvert",
    ".arrow": "write it as .parquet",
    ".feather": "write it as .parquet",
}


def refusal(path: Path) -> str:
    """The remedy for a file that is not read because of its name; empty = it is read."""
    kinds = [suffix.lower() for suffix in path.suffixes[-2:]]
    if kinds[-1:] == [".gz"]:
        if kinds[:-1] in ([".parquet"], [".tar"]):
            return f"{_UNPACK}; of packed files only single texts are read"
        kinds = kinds[:-1]
    return _REFUSED.get(kinds[-1], "") if kinds else ""
