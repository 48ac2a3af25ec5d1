"""A stand-in for the trainer: a vector instead of a model and no steps; everything between snapshot
and merge is the real one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from xpeer.mixing.exchanges import Exchanges
from xpeer.mixing.rules import Rule
from xpeer.training.flat import FlatVector
from xpeer.update import (
    Checked,
    CompressedUpdate,
    PeerUpdate,
    PrivateUpdate,
    RawUpdate,
    received_stamp,
)
from xpeer.wire.fixedpoint import Grid

_T = TypeVar("_T")


class _NoPrivacy:
    """Certifies that there is none."""

    def stamp(self, raw: RawUpdate) -> PrivateUpdate:
        return PrivateUpdate(raw.values, raw.step, received_stamp("off", 0))


class Vector:
    """`round.Trainer` on a vector; heavy work on a helper thread, as in production.

    Args:
        values: (P,) float32, CPU; copied.
        num_fragments: F.
        codec: of all payloads.
        grid: of masked groups, instead.
    """

    step = window = ledger_counter = 0
    resumed_step: int | None = None

    def __init__(
        self, values: torch.Tensor, num_fragments: int, codec: str, grid: Grid | None = None
    ) -> None:
        self.epoch = 1
        self.parameters = FlatVector(len(values), num_fragments)
        self.parameters.write(values)
        self.exchanges = Exchanges(
            self.parameters,  # type: ignore[arg-type] # it has no gradients
            codec,
            _NoPrivacy(),
            Rule(),
            grid,
        )
        self.exchanges.begin()
        self._helper = ThreadPoolExecutor(1, "helper")

    def fragment_values(self, fragment: int, *, averaging: bool) -> int:
        """Values in a fragment."""
        del averaging  # it is all that this one does
        return self.exchanges.fragments.size(fragment)

    async def snapshot(
        self, meeting_id: int, fragment: int, *, averaging: bool
    ) -> CompressedUpdate:
        """Copy a fragment, then quantise it."""
        private = self.exchanges.take(meeting_id, fragment, self.step, averaging=averaging)
        return await self._on_helper(self.exchanges.compress, meeting_id, private)

    async def verify(self, meeting_id: int, exchange_id: int, update: PeerUpdate) -> Checked:
        """Decode the partner's, and compare."""
        return await self._on_helper(self.exchanges.verify, meeting_id, exchange_id, update)

    async def merge(self, meeting_id: int, weights: dict[int, float]) -> None:
        """Add what was accepted."""
        await self._on_helper(self.exchanges.resolve, meeting_id, weights)
        self.exchanges.merge(meeting_id, self.step)

    def drop(self, meeting_id: int) -> None:
        """Give up."""
        self.exchanges.drop(meeting_id)

    async def _on_helper(self, work: Callable[..., _T], *arguments: object) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._helper, work, *arguments)
