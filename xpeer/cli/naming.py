"""Errors name what the operator gave: the option, and not the setting that it stands for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from xpeer.errors import LocalError


@contextmanager
def naming(options: Mapping[str, str]) -> Iterator[None]:
    """Have errors name options.

    Args:
        options: name of the option that was given, by its setting, e.g. `data.text_field`. Empty =
            none was given, and the setting is what counts.
    """
    try:
        yield
    except LocalError as e:
        for setting, option in options.items():
            if option:
                words = re.compile(rf"(?<![\w./-]){re.escape(setting)}(?![\w/-])")
                e.problem, e.remedy = (words.sub(option, text) for text in (e.problem, e.remedy))
        e.args = (e.problem,)
        raise
