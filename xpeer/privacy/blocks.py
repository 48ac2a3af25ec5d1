"""Records' gradients by an output layer of many tokens, some of its rows at a time.

`layers.Outer` keeps two factors of a layer. Of an output layer one factor is the gradient of the
logits: as many values a record as tokens times vocabulary. `Blocked` does not keep it. It computes
some of its columns again whenever they are asked for. So a pass needs memory for a block, whatever
the vocabulary.

Both times, for the norms and for the sum, the same code computes the same blocks of the same
tensors. So what is added up is what was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

_CPU_BLOCK: Final = 1 << 22
"""Values of a block on a processor."""
_DEVICE_BLOCK: Final = 1 << 26
"""The same on other devices, where large products pay."""
_CPU_KEPT: Final = 1 << 26
_DEVICE_KEPT: Final = 1 << 25


@dataclass(frozen=True, slots=True)
class Blocked:
    """Gradients of B records by a matrix (p, d), as sums over T tokens of outer products.

    As `layers.Outer`, but for `rows`, which are computed when they are asked for.
    """

    rows: Callable[[int, int], Tensor]
    """Columns from, and up to: (B, T, n), in the precision in which the layer computed."""
    cols: Tensor  # (B, T, d)
    num_rows: int
    """p."""

    def parts(self) -> Iterator[tuple[int, int]]:
        """The blocks: from, and up to. They depend on shapes and device alone."""
        batch, tokens, width = self.cols.shape
        values = _CPU_BLOCK if self.cols.device.type == "cpu" else _DEVICE_BLOCK
        size = max(1, values // (batch * max(tokens, width)))
        for start in range(0, self.num_rows, size):
            yield start, min(start + size, self.num_rows)

    def block(self, start: int, stop: int) -> Tensor:
        """Rows of the gradients, (B, stop - start, d) float32; the caller may change them."""
        return torch.bmm(self.rows(start, stop).float().transpose(1, 2), self.cols.float())

    def sums(self) -> Tensor:
        """The sum over tokens, without the other factor: (B, p) float32; of a bias."""
        blocks = [self.rows(*part).sum(1, dtype=torch.float32) for part in self.parts()]
        return torch.cat(blocks, 1)

    def add_weighted(self, factors: Tensor, out: Tensor) -> None:
        """Add the sum over records of factor times gradient to `out`, (p, d)."""
        cols = (self.cols.float() * factors[:, None, None]).flatten(0, 1)
        for start, stop in self.parts():
            rows = self.rows(start, stop).flatten(0, 1).float()
            out[start:stop].addmm_(rows.T, cols)


@dataclass(frozen=True, slots=True)
class BlockedCall:
    """One call of an output layer, whose logits are not there."""

    module: nn.Linear
    factors: Blocked


def kept_values(device: torch.device) -> int:
    """Values up to which the gradients of a pass's logits are kept. That is faster than to compute
    them again, by up to a quarter of a pass on a processor.
    """
    return _CPU_KEPT if device.type == "cpu" else _DEVICE_KEPT
