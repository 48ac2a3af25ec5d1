"""Several local ranks that take one private step together, with its noise added exactly once.

Each rank samples from a part of the units of its own and adds noise of variance 1 / world of the
step's to its own sum, before the sums are added up. So no rank shows another a sum without noise,
the total has the variance that is accounted for, and no rank waits for one that draws for all. All
ranks belong to one node and one trust: each knows its own part of the noise and could subtract it.

The steps of all ranks are one step of the ledger, charged by whoever holds it before any begins. A
rank that fails makes the sum fail at every other, and a step that broke off is never shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch.distributed as dist
from torch import Tensor


class Ranks(Protocol):
    """The ranks of a step, seen from one of them."""

    rank: int
    world: int

    def add_up(self, sums: Sequence[Tensor]) -> None:
        """Replace each by its sum over all ranks, the same bits everywhere."""


class Alone:
    """One rank."""

    rank = 0
    world = 1

    def add_up(self, sums: Sequence[Tensor]) -> None:
        """Nobody else has one."""


class ProcessGroup:
    """The ranks of a torch process group.

    Args:
        group: None = all processes.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.world = dist.get_world_size(group)

    def add_up(self, sums: Sequence[Tensor]) -> None:
        """All at once; waits for the slowest rank."""
        waiting = [dist.all_reduce(x, group=self._group, async_op=True) for x in sums]
        for work in waiting:
            if work is not None:
                work.wait()
