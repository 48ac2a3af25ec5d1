"""Recognises that memory ran out, and says what helps.

It imports no torch, since commands start without it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from typing import Any, Final

from xpeer.errors import ShortOfMemoryError

_OF_CPU: Final = ("can't allocate memory", "not enough memory")
"""What torch's allocator says on a processor; it has no error of its own."""
_MMAP_THRESHOLD: Final = -3
_ARENA_MAX: Final = -8
"""glibc's M_MMAP_THRESHOLD and M_ARENA_MAX."""
_LARGE: Final = 1 << 18
"""Bytes of a block that is given back as soon as it is freed, where memory is short."""


def out_of_memory(error: BaseException) -> bool:
    """Whether a device, or this machine, had too little memory."""
    if isinstance(error, MemoryError | ShortOfMemoryError) or _of_device(error):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OF_CPU)


def in_words(error: BaseException) -> ShortOfMemoryError:
    """The same for the operator.

    It holds no number: sizes may follow from the number of records that were sampled.

    Args:
        error: for which `out_of_memory` is true.
    """
    if isinstance(error, ShortOfMemoryError):
        return error
    if _of_device(error):
        return ShortOfMemoryError(
            "the GPU ran out of memory",
            "set training.checkpoint_activations to on and training.micro_batch to 1, end what "
            "else uses the GPU, or set training.device to cpu; in a new swarm train adapters, or "
            "set --base-dtype; `xpeer estimate` says what each phase needs",
        )
    return ShortOfMemoryError(
        "this machine ran out of memory",
        "free some, or allow the process more (ulimit, systemd's MemoryMax); to train, set "
        "training.micro_batch to 1 and training.checkpoint_activations to on; `xpeer estimate` "
        "says what each phase needs",
    )


def share_freed() -> None:
    """Have all threads use what any of them freed; call it before there are others.

    The C library would keep an arena for each thread, and of a trainer's memory a quarter in them.
    Its blocks are so large that no thread waits for another.
    """
    _tell_allocator(_ARENA_MAX, 1)


def keep_nothing() -> None:
    """Have memory given back as soon as it is freed. Steps take a third longer.

    The C library would keep it for later in pieces, of which the next block fits into few.
    """
    _tell_allocator(_MMAP_THRESHOLD, _LARGE)
    give_back()


def give_back() -> None:
    """Give the system memory back that was freed so far."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not every C library has this
        ctypes.CDLL(None).malloc_trim(0)


def _tell_allocator(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # not every C library has this
        ctypes.CDLL(None).mallopt(option, value)


def _of_device(error: BaseException) -> bool:
    torch: Any = sys.modules.get("torch")  # it was imported, if it raised this
    kind = getattr(torch, "OutOfMemoryError", None)
    return kind is not None and isinstance(error, kind)
