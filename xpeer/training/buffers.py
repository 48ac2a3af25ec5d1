"""Float32 memory that is used again: fresh pages cost more than what is done with them.

Copying 100 M values into new memory took 0.4 s on a virtual machine, into used memory 0.06 s.
"""

from __future__ import annotations

import threading

import torch


class Buffers:
    """Spare tensors by their size. Thread-safe.

    Args:
        most: kept, of all sizes together; those of the sizes that are given back latest.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._spare: list[torch.Tensor] = []
        self._lock = threading.Lock()

    def take(self, num_values: int) -> torch.Tensor:
        """(num_values,) float32, CPU, of any content."""
        with self._lock:
            for number, tensor in enumerate(self._spare):
                if tensor.numel() == num_values:
                    return self._spare.pop(number)
        return torch.empty(num_values, dtype=torch.float32)

    def give(self, tensor: torch.Tensor) -> None:
        """Take back what nobody refers to any more, (n,) float32, CPU, contiguous."""
        with self._lock:
            self._spare.append(tensor)
            del self._spare[: -self._most]
