"""Runs the functions of `blockwise` over many blocks: compiled where that works, plain otherwise.

Compiled code reads a chunk's memory once; plain code makes its temporaries in chunks that stay in
the cache. Both give the same bytes, so no peer needs to know what its partner runs.

A function is compiled for any number of rows, at its first large use in a process. That takes
seconds, and torch keeps the result on the disk for the next process. Small inputs are not worth it.
If anything goes wrong, the reason is logged once and the process goes on with plain code.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

from xpeer.forms import BLOCK
from xpeer.wire.blockwise import Blocks

log = logging.getLogger("xpeer.codec")

ROWS: Final = 8192
"""Blocks per call of a compiled function: 4 MiB of float32, against 30 microseconds per call."""
PLAIN_ROWS: Final = 1024
"""Blocks per call of a plain function: 512 KiB of float32, so that temporaries fit the cache."""

Argument = torch.Tensor | None
Plain = Callable[..., None]


def configure(*, compile: bool) -> None:
    """Set whether this process may compile kernels from now on. By default it may not: a command
    that reads a checkpoint and ends would only lose the seconds that compiling takes.
    """
    _state.allowed = compile


def is_large(num_values: int) -> bool:
    """Whether an input of so many values would run compiled."""
    return num_values // BLOCK >= ROWS


def compiling() -> bool:
    """Whether large inputs run compiled: it is allowed and has not failed."""
    return _state.allowed


def run(plain: Plain, ints: Blocks, *arguments: Argument) -> None:
    """Call `plain(ints, *arguments)` on chunks of rows.

    Args:
        plain: a function of `blockwise`.
        ints: the int codec.
        arguments: each has one row per block; all but the first may be None.
    """
    first = arguments[0]
    if first is None:
        raise TypeError("the first argument tells the number of rows")
    rows = first.shape[0]
    torch.get_num_threads()  # a thread's first call makes OpenMP know torch's setting
    with torch.no_grad():
        start = 0
        while start < rows:
            # Compiled code runs for any number of rows except one, which torch treats apart.
            compiled = _state.allowed and rows >= ROWS and rows - start > 1
            end = min(start + (ROWS if compiled else PLAIN_ROWS), rows)
            chunk = [None if a is None else a[start:end] for a in arguments]
            if not (compiled and _run_compiled(plain, ints, chunk)):
                plain(ints, *chunk)
            start = end


@dataclass(slots=True)
class _State:
    allowed: bool = False


_state = _State()
_compiled: dict[tuple[Any, ...], Callable[..., None]] = {}
_compile_lock = threading.Lock()


def _run_compiled(plain: Plain, ints: Blocks, chunk: list[Argument]) -> bool:
    """Run a chunk compiled. False: it can't be compiled, and nothing was written."""
    key = (plain, ints, *(a is None for a in chunk))
    try:
        kernel = _compiled.get(key)
        if kernel is not None:
            kernel(*chunk)
            return True
        with _compile_lock:
            kernel = _compiled.get(key) or _wrap(plain, ints, len(_compiled))
            _mark_rows(chunk)
            kernel(*chunk)
            _compiled[key] = kernel
    except Exception as e:  # noqa: BLE001 - torch raises many kinds; there is always plain code
        _state.allowed = False
        cause = getattr(e, "inner_exception", e)
        reason = str(cause).strip().partition("\n")[0][:200]
        log.warning(
            "codec kernels are not compiled, so the codec is slower: %s: %s",
            type(cause).__name__,
            reason,
        )
        return False
    return True


def _wrap(plain: Plain, ints: Blocks, number: int) -> Callable[..., None]:
    def kernel(*arguments: Argument) -> None:
        plain(ints, *arguments)

    # torch finds compiled code by the code object: each kernel needs its own, as nothing else is
    # checked at a call. Types, widths and contiguity are always the same; rows may differ.
    kernel.__code__ = kernel.__code__.replace(co_name=f"{plain.__name__}_{number}")
    return torch.compile(
        kernel,
        fullgraph=True,
        dynamic=False,
        options={
            "cpp.dynamic_threads": True,  # ask for the thread count at every call
            "compile_threads": 1,  # no pool of worker processes
            "guard_filter_fn": lambda guards: [False] * len(guards),
        },
    )


def _mark_rows(chunk: list[Argument]) -> None:
    """Tell torch that only the number of rows may differ from call to call."""
    for a in chunk:
        if a is not None:
            torch._dynamo.mark_dynamic(a, 0)
