"""Memory that is used again: fresh pages cost more than the work that is done in them.

Copying 100 M float32 into new memory took 0.4 s on a virtual machine, into used memory 0.06 s.
"""

from __future__ import annotations

import threading

import torch


class Buffers:
    """Spare CPU tensors by their size and type. Thread-safe.

    Args:
        most: number of spare tensors to keep; the oldest are dropped first.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._spare: list[torch.Tensor] = []
        self._lock = threading.Lock()

    def take(self, size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return a tensor of (size,), with any content: a spare one if there is one."""
        with self._lock:
            for number, tensor in enumerate(self._spare):
                if tensor.numel() == size and tensor.dtype == dtype:
                    return self._spare.pop(number)
        return torch.empty(size, dtype=dtype)

    def give(self, tensor: torch.Tensor) -> None:
        """Keep a flat, contiguous tensor that nobody refers to any more."""
        with self._lock:
            self._spare.append(tensor)
            del self._spare[: -self._most]

    def clear(self) -> None:
        """Keep no spare tensor."""
        with self._lock:
            self._spare.clear()
