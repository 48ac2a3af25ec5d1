"""Memory that is used again: fresh pages cost more than what is done with them.

Copying 100 M float32 into new memory took 0.4 s on a virtual machine, into used memory 0.06 s.
"""

from __future__ import annotations

import threading

import torch


class Buffers:
    """Spare CPU tensors by their size and type. Thread-safe.

    Args:
        most: kept, of all kinds together; the latest that were given back.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._spare: list[torch.Tensor] = []
        self._lock = threading.Lock()

    def take(self, size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """(size,) of any content."""
        with self._lock:
            for number, tensor in enumerate(self._spare):
                if tensor.numel() == size and tensor.dtype == dtype:
                    return self._spare.pop(number)
        return torch.empty(size, dtype=dtype)

    def give(self, tensor: torch.Tensor) -> None:
        """Take back what nobody refers to any more: flat and contiguous."""
        with self._lock:
            self._spare.append(tensor)
            del self._spare[: -self._most]
