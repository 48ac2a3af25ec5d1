"""Text from outside, made harmless for a terminal: names of files and peers, errors of libraries.

Whatever is printed for people or logged passes here.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

_TOKEN = re.compile(r"xpeer1\.(?:(?!xpeer1\.)[A-Za-z0-9_=-])+")
"""Of two that follow without a gap each is one."""


def hidden(text: str) -> str:
    """Without the tokens in it: whoever holds one may join."""
    return _TOKEN.sub("xpeer1.[hidden]", text)


def visible(text: str) -> str:
    """Control characters as escapes: what somebody else named never steers a terminal.

    So are characters that reverse or hide text, and bytes of a file's name that are not UTF-8,
    which nothing could print.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """An error's text in one visible line."""
    return visible(" ".join(part.strip() for part in text.splitlines() if part.strip()))


def json_text(value: Any, *, indent: int = 0) -> str:
    """A struct, dict or list as JSON in which nothing steers a terminal.

    Strings keep their value: what can't be printed is written as JSON's own escape. Only bytes that
    are not UTF-8, which JSON has no way to say, are spelled out.
    """
    try:
        encoded = msgspec.json.encode(value)
    except UnicodeEncodeError:
        encoded = msgspec.json.encode(_sayable(msgspec.to_builtins(value)))
    if indent:
        encoded = msgspec.json.format(encoded, indent=indent)
    return "".join(c if c.isprintable() or c == "\n" else _escaped(c) for c in encoded.decode())


def _escaped(character: str) -> str:
    units = character.encode("utf-16-be").hex()
    return "".join(f"\\u{units[n : n + 4]}" for n in range(0, len(units), 4))


def _sayable(value: Any) -> Any:
    if isinstance(value, str):
        return "".join(c if not "\ud800" <= c <= "\udfff" else repr(c)[1:-1] for c in value)
    if isinstance(value, dict):
        return {_sayable(key): _sayable(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_sayable(inner) for inner in value]
    return value
