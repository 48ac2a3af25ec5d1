"""Commands for people to type next: complete, and quoted for a shell."""

from __future__ import annotations

import shlex
from pathlib import Path

from xpeer.config import DEFAULT_HOME, Home


def command(home: Home | None, *words: str | Path) -> str:
    """`xpeer WORDS --home HOME`, without --home where it is the default."""
    line = shlex.join(["xpeer", *map(str, words)])
    if home is None or home.path == Home(DEFAULT_HOME).path:
        return line
    return f"{line} --home {shlex.quote(str(home.path))}"
