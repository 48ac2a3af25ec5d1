"""Text from outside, made harmless for a terminal: names of files and peers, errors of libraries.

Whatever is printed for people or logged passes here.
"""

from __future__ import annotations

import re
import traceback
from typing import Any

import msgspec

_TOKEN = re.compile(r"xpeer1\.(?:(?!xpeer1\.)[A-Za-z0-9_=-])+")
"""Of two that follow without a gap each is one."""
_CUT = " [...] "


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


def without_words(error: BaseException) -> str:
    """An error whose words may be about private text: its type, and the last line of ours."""
    ours = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        module = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] == "xpeer":
            ours = f" in {module}, line {line}"
    return type(error).__name__ + ours


def json_text(value: Any, *, indent: int = 0) -> str:
    """A struct, dict or list as JSON in which nothing steers a terminal.

    Strings keep their value: what can't be printed is written as JSON's own escape. Only bytes that
    are not UTF-8, which JSON has no way to say, are spelled out.
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
    """The same of builtins, with strings that can be encoded.

    Args:
        value: str, dict, list, or anything else.
        longest: characters; of longer strings the middle is cut out; 0 = any.
        of_trace: the same for a field called `trace`.
    """
    if isinstance(value, str):
        said = "".join(c if not "\ud800" <= c <= "\udfff" else repr(c)[1:-1] for c in value)
        return _cut(said, longest) if 0 < longest < len(said) else said
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
