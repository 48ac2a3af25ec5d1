"""The order of records without privacy: shuffled passes that survive a change of the shard.

A shard changes, for instance, when a corpus is divided anew. The pass then goes on with those of
the present records that this node has not used in it. A record that comes from another member is
used here, even if that member has used it already. One that goes to another member is dropped. No
record of this node waits for the next pass.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from xpeer.privacy.noise import SecretGenerator
from xpeer.privacy.steps import Records

_BLOCK: Final = 4096
"""Records that are named at once."""


class Passes:
    """Endless shuffled passes over the records.

    Args:
        records: (n, T) int64, CPU.
        seen: `seen` of an earlier start, whose records may have been others.
    """

    def __init__(self, records: Records, seen: Tensor | None = None) -> None:
        self._names = _names(records)
        self._generator = SecretGenerator()
        order = self._generator.shuffled(len(records))
        if seen is not None:
            order = order[~torch.isin(self._names[order], seen)]
        self._order = order

    def take(self, count: int) -> Tensor:
        """Indices of the next records, (count,) int64. `count` is at most the number of records."""
        if len(self._order) < count:  # the rest of this pass comes before the next one
            fresh = self._generator.shuffled(len(self._names))
            self._order = torch.cat([self._order, fresh])
        chosen, self._order = self._order[:count], self._order[count:]
        return chosen

    @property
    def seen(self) -> Tensor:
        """Names of the records that the present pass has used, (m,) int64."""
        left = torch.zeros(len(self._names), dtype=torch.bool)
        left[self._order] = True
        return self._names[~left]


def _names(records: Records) -> Tensor:
    """Name records by their content, (n,) int64: a multilinear hash modulo 2^64, with fixed
    factors.
    """
    limits = torch.iinfo(torch.int64)
    factors = torch.randint(
        limits.min, limits.max, (records.shape[1],), generator=torch.Generator().manual_seed(0)
    )
    blocks = range(0, len(records), _BLOCK)
    return torch.cat([records[at : at + _BLOCK] @ factors for at in blocks])
