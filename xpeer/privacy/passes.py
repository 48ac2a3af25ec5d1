"""In which order records are seen without privacy: shuffled passes that survive a new division.

When a shard changes, e.g. because a shared corpus is divided anew, a pass goes on with those of the
present records that this node has not seen in it. What comes from another member is seen once more,
what goes to another is dropped, and nothing waits for a second pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xpeer.privacy.noise import SecretGenerator


class Passes:
    """Where training is among its records.

    Args:
        records: (n, T) int64, CPU.
        seen: `seen` of an earlier start, maybe with other records.
    """

    def __init__(self, records: Tensor, seen: Tensor | None = None) -> None:
        self._names = _names(records)
        self._generator = SecretGenerator()
        order = self._generator.shuffled(len(records))
        if seen is not None:
            order = order[~torch.isin(self._names[order], seen)]
        self._order = order

    def take(self, count: int) -> Tensor:
        """The next records' indices, (count,) int64; at most as many as there are."""
        if len(self._order) < count:  # the rest of a pass goes to the front of the next
            fresh = self._generator.shuffled(len(self._names))
            self._order = torch.cat([self._order, fresh])
        taken, self._order = self._order[:count], self._order[count:]
        return taken

    @property
    def seen(self) -> Tensor:
        """Names of the records that the present pass is through with, (m,) int64."""
        left = torch.zeros(len(self._names), dtype=torch.bool)
        left[self._order] = True
        return self._names[~left]


def _names(records: Tensor) -> Tensor:
    """By content, (n,) int64: a multilinear hash modulo 2^64, with fixed factors."""
    limits = torch.iinfo(torch.int64)
    factors = torch.randint(
        limits.min, limits.max, (records.shape[1],), generator=torch.Generator().manual_seed(0)
    )
    return records @ factors
