"""Makes text from outside harmless for a terminal: names of files and peers, errors of libraries.

All text that is printed for people or logged goes through this module.
"""

from __future__ import annotations

import re
import traceback
from typing import Any

import msgspec

_TOKEN = re.compile(r"xpeer1\.(?:(?!xpeer1\.)[A-Za-z0-9_=-])+")
"""An invitation token; two without a gap between them are two matches."""
_CUT = " [...] "


def hidden(text: str) -> str:
    """The text without invitation tokens, since whoever has one may join."""
    return _TOKEN.sub("xpeer1.[hidden]", text)


def visible(text: str) -> str:
    """The text with control characters as escapes, so that no foreign name can steer a terminal.

    Characters that reverse or hide text become escapes, too, and bytes of a file's name that are
    not UTF-8, which nothing could print.
    """
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """An error's text in one visible line."""
    return visible(" ".join(part.strip() for part in text.splitlines() if part.strip()))


def without_words(error: BaseException) -> str:
    """A summary of an error whose message may quote private text: its type, and our last line."""
    ours = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] == "xpeer":
            ours = f" in {module}, line {line}"
    return type(error).__name__ + ours


def json_text(value: Any, *, indent: int = 0) -> str:
    """A struct, dict or list as JSON in which nothing steers a terminal.

    Strings keep their value: characters that can't be printed become JSON's own escapes. Only bytes
    that are not UTF-8 are spelled out, since JSON can't express them.
    """
    try:
        encoded = msgspec.json.encode(value)
    except UnicodeEncodeError:
        encoded = msgspec.json.encode(sayable(msgspec.to_builtins(value)))
    if indent:
        encoded = msgspec.json.format(encoded, indent=indent)
    return "".join(c if c.isprintable() or c == "\n" else _escaped(c) for c in encoded.decode())


def _escaped(character: str) -> str:
    units = character.encode("utf-16-be").hex()
    return "".join(f"\\u{units[n : n + 4]}" for n in range(0, len(units), 4))


def sayable(value: Any, longest: int = 0, of_trace: int = 0) -> Any:
    """Builtins with all strings made encodable.

    Args:
        value: str, dict, list, or anything else.
        longest: characters; the middle of longer strings is cut out; 0 = no limit.
        of_trace: the same for a field called `trace`.
    """
    if isinstance(value, str):
        text = "".join(c if not "\ud800" <= c <= "\udfff" else repr(c)[1:-1] for c in value)
        return _cut(text, longest) if 0 < longest < len(text) else text
    if isinstance(value, dict):
        return {
            sayable(key, longest): sayable(inner, of_trace if key == "trace" else longest, of_trace)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [sayable(inner, longest, of_trace) for inner in value]
    return value


def _cut(text: str, longest: int) -> str:
    half = (longest - len(_CUT)) // 2
    return text[:half] + _CUT + text[-half:]
