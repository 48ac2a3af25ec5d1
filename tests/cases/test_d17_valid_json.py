"""Valid JSON is read, and what is not says where it breaks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.in_memory import load_documents
from xpeer.errors import ConfigError

GOOD = {
    "a long integer": '{"n": ' + "7" * 5000 + ', "text": "good"}',
    "a long negative one": '{"text": "good", "n": [-' + "7" * 9999 + "]}",
    "a large exponent": '{"n": 1e999999, "text": "good"}',
    "not a number": '{"n": NaN, "m": -Infinity, "text": "good"}',
    "a key twice": '{"text": "bad", "text": "good"}',
    "a byte order mark": '\ufeff{"text": "good"}',
    "nested": '{"n": ' + "[" * 200 + "]" * 200 + ', "text": "good"}',
    "lone surrogate elsewhere": '{"n": "\\ud800", "text": "good"}',
    "spaces": ' \t{ "text" : "good" } ',
}
EXACT = {
    '{"text": "\\u0000good"}': "\0good",
    '{"text": "go\u2028od"}': "go\u2028od",
    '{"text": "\\ud83d\\ude00"}': "\U0001f600",
    '{"text": "' + "x" * 3_000_000 + '"}': "x" * 3_000_000,
}


def read(path: Path, data: str, end: str = "\n") -> list[str]:
    path.write_bytes((data + end).encode())
    return [document.text for document in load_documents([str(path)])]


@pytest.mark.parametrize("line", GOOD.values(), ids=GOOD.keys())
def test_a_valid_line_is_read(tmp_path: Path, line: str) -> None:
    try:
        found = read(tmp_path / "a.jsonl", line)
    except ConfigError as e:
        found = [str(e)[:200]]
    assert found == ["good"]


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n\r\n"], ids=repr)
def test_line_ends(tmp_path: Path, end: str) -> None:
    lines = f'{{"text": "one"}}{end or chr(10)}{{"text": "two"}}'
    assert read(tmp_path / "a.jsonl", lines, end) == ["one", "two"]


@pytest.mark.parametrize(("line", "text"), EXACT.items(), ids=["nul", "u2028", "pair", "huge"])
def test_the_text_is_kept_as_it_is(tmp_path: Path, line: str, text: str) -> None:
    assert read(tmp_path / "a.jsonl", line) == [text]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": "half', r":2: not valid JSON at character 10 of the line \(Unterminated"),
        ('{"text": "a"}{"text": "b"}', r":2: not valid JSON at character 14 .*Extra data"),
        ("{'text': 'a'}", r":2: not valid JSON at character 2"),
        ('{"text": "tab\there"}', r":2: not valid JSON at character 14 .*control character"),
        ('{"n": ' + "[" * 5000 + "]" * 5000 + ', "text": "a"}', ":2: .*nested too deeply"),
        ('{"text": "a\\ud800"}', ":2: .*half a surrogate pair at character 1"),
        ('"text"', ":2: not a JSON object"),
    ],
)
def test_what_is_refused_is_located(tmp_path: Path, line: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        read(tmp_path / "a.jsonl", f'{{"text": "good"}}\n{line}')
