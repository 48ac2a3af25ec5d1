"""Several local ranks that take one private step in common, with its noise added exactly once.

Each rank samples from its own part of the units. It adds noise of variance 1 / world of the step's
to its own sum, before the sums are added up. So no rank reveals a sum without noise to another, the
total has the variance that is accounted for, and no rank waits for one that draws for all. All
ranks belong to one node and trust one another: each knows its own part of the noise and could
subtract it.

A step of all ranks is one step of the ledger. The rank that holds the ledger charges it before any
rank begins. If a rank fails, the sum fails at every other, and a step that broke off is never
released.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch.distributed as dist
from torch import Tensor


class Ranks(Protocol):
    """The ranks of a step, seen from one of them.

    Attributes:
        rank: number of this rank, from 0.
        world: number of ranks.
    """

    rank: int
    world: int

    def add_up(self, sums: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks. All ranks get the same bits."""


class Alone:
    """A single rank."""

    rank = 0
    world = 1

    def add_up(self, sums: Sequence[Tensor]) -> None:
        """Do nothing: there is no other rank."""


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
        """Add up all tensors concurrently. Waits for the slowest rank."""
        waiting = [dist.all_reduce(x, group=self._group, async_op=True) for x in sums]
        for work in waiting:
            if work is not None:
                work.wait()
