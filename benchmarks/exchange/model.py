"""The values that are averaged, and xpeer's half of a trainer around them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import torch

from xpeer.forms import Form
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
from xpeer.wire import kernels

if TYPE_CHECKING:
    from xpeer.mixing.parameters import Parameters
    from xpeer.privacy.mechanism import Mechanism

SHOWN = 2048
"""Values that a child shows for checking."""


def values_of(rank: int, num_params: int) -> torch.Tensor:
    """Peer `rank`'s parameters before: (num_params,) float32, CPU; peers differ by a few percent.

    One drawn block of a million, repeated: no codec here gains anything by that.
    """
    generator, block = torch.Generator().manual_seed(1), min(num_params, 1_000_000)
    drawn = torch.randn(block, generator=generator).mul_(0.02)
    drawn += torch.randn(block, generator=generator.manual_seed(2 + rank)).mul_(0.0005)
    return drawn.repeat(-(-num_params // block))[:num_params]


class AveragingTrainer:
    """`round.Trainer` around the trainer's own `Exchanges`, with one fragment and nothing to train.
    Helper threads do what the trainer process does off its training thread; payloads cross no
    process, which costs a copy of them each way in production.

    Args:
        values: (n,) float32, CPU; copied.
        codec_name: of all payloads.

    Attributes:
        seconds: spent in each stage so far.
    """

    def __init__(self, values: torch.Tensor, codec_name: str) -> None:
        self._vector = FlatVector(len(values), 1)
        self._vector.write(values)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        parameters = cast("Parameters", self._vector)  # it has no gradients
        mechanism = cast("Mechanism", SimpleNamespace(stamp=_stamp))
        self.form = Form(codec_name, self._vector.fragments.size(0))
        self._exchanges = Exchanges(parameters, codec_name, mechanism, Rule())
        self._exchanges.begin()
        kernels.configure(compile=True)  # as a trainer does
        for _ in range(2):  # memory that a peer in mid-run has in use
            self._exchanges.buffers.give(torch.zeros(self.form.num_values))
            self._exchanges.buffers.give(torch.zeros(self.form.num_bytes, dtype=torch.uint8))
        self._ready = 0.0

    @property
    def values(self) -> torch.Tensor:
        """(n,) float32: a copy."""
        return self._vector.read()

    async def snapshot(
        self, meeting_id: int, fragment: int, *, averaging: bool
    ) -> CompressedUpdate:
        """Copy and quantise."""
        taken = await asyncio.to_thread(self._snapshot, meeting_id, fragment)
        self._ready = time.perf_counter()
        return taken

    async def verify(self, meeting_id: int, exchange_id: int, update: PeerUpdate) -> Checked:
        """Decode and bound the partner's."""
        self.seconds["swap"] += time.perf_counter() - self._ready
        return await asyncio.to_thread(self._verify, meeting_id, exchange_id, update)

    async def merge(self, meeting_id: int, weights: dict[int, float]) -> None:
        """Merge what was verified: theta += w z."""
        await asyncio.to_thread(self._merge, meeting_id, weights)

    def drop(self, meeting_id: int) -> None:
        """Forget a meeting."""
        self._exchanges.drop(meeting_id)

    def _snapshot(self, meeting_id: int, fragment: int) -> CompressedUpdate:
        with self._timed("copy"):
            private = self._exchanges.take(meeting_id, fragment, step=0)
        with self._timed("encode"):
            return self._exchanges.compress(meeting_id, private)

    def _verify(self, meeting_id: int, exchange_id: int, update: PeerUpdate) -> Checked:
        with self._timed("difference"):
            return self._exchanges.verify(meeting_id, exchange_id, update)

    def _merge(self, meeting_id: int, weights: dict[int, float]) -> None:
        with self._timed("merge"):
            self._exchanges.resolve(meeting_id, weights)
            self._exchanges.merge(meeting_id, step=0)

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start


def _stamp(raw: RawUpdate) -> PrivateUpdate:
    return PrivateUpdate(raw.values, raw.step, received_stamp("off", 0))
