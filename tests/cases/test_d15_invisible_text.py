"""A text without anything to see is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.in_memory import load_documents
from xpeer.errors import ConfigError

INVISIBLE = {
    "zero-width": "\u200b\u200c\u200d\u2060\ufeff",
    "soft hyphens": "\u00ad \u00ad",
    "directions": "\u200e\u202e\u2066\u2069",
    "controls": "\x01\x02\x1b\x7f\x85",
    "spaces": "\u00a0\u2003\u3000\u2028\u2029",
    "variation selectors": "\ufe0f\U000e0100",
    "tags": "\U000e0041\U000e0042",
    "marks on nothing": "\u0301\u0302",
    "fillers": "\u3164\u115f\u1160\uffa0\u2800",
    "private use": "\ue000\U0010fffd",
    "noncharacters": "\ufffe\uffff",
}
VISIBLE = ["a", "\u200bé", "0", "…", "™", "字", "ا", "\U0001f600\ufe0f", "\u200b" * 500 + "x"]


@pytest.mark.parametrize("text", INVISIBLE.values(), ids=INVISIBLE.keys())
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_invisible_text_is_no_text(tmp_path: Path, text: str, suffix: str) -> None:
    written = '{"text": "' + "".join(f"\\u{ord(c):04x}" for c in text if ord(c) < 65536) + '"}'
    path = tmp_path / f"a{suffix}"
    path.write_text(text * 20 if suffix == ".txt" else written, encoding="utf-8")
    with pytest.raises(ConfigError, match="no text in"):
        load_documents([str(path)])


@pytest.mark.parametrize("text", VISIBLE)
def test_one_visible_character_is_enough(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (document,) = load_documents([str(tmp_path)])
    assert document.text == text
