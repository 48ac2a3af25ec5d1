"""Imports of torch and its like, without the garbage collector.

They make a million objects that all stay. The collector would walk through them dozens of times,
which took a fifth of a trainer's imports, and again at each full collection later.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def imports() -> Iterator[None]:
    """Import without collections; nothing that is there at the end is ever looked at again."""
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collected:
            gc.enable()
