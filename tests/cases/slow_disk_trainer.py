"""A trainer process whose disk is slow; a parent runs it as its program."""

from __future__ import annotations

import os
import time
from typing import Any

from xpeer.trainer.main import main
from xpeer.training import tensor_file

SAVE_S = 5.0


def slow_down() -> None:
    """A checkpoint takes about `SAVE_S`, in whatever pieces it is written."""
    real = tensor_file.save_file

    def slow(tensors: Any, path: Any, **options: Any) -> None:
        if hasattr(tensor_file, "_PIECE"):
            size = sum(tensor.nbytes for tensor in tensors.values())
            setattr(tensor_file, "_PIECE", size // 10)  # noqa: B010 - older code has none
            setattr(os, "fdatasync", lambda _fd: time.sleep(SAVE_S / 10))  # noqa: B010
        else:
            time.sleep(SAVE_S)
        real(tensors, path, **options)

    tensor_file.save_file = slow


if __name__ == "__main__":
    slow_down()
    main()
