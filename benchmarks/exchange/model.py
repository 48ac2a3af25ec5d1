"""The values that are averaged, and xpeer's half of a trainer around them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

import torch

from xpeer.training.mixing import Difference, NormLimit, difference
from xpeer.update import CompressedUpdate, PeerUpdate, received_stamp
from xpeer.wire import codec

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
    """`round.Trainer` over one flat fragment; the codec works on a helper thread, as in production,
    into a buffer that is reused, as production's shared memory is.

    Args:
        values: (n,) float32, CPU; changed in place.
        codec_name: of all payloads.

    Attributes:
        seconds: spent in each stage so far.
    """

    def __init__(self, values: torch.Tensor, codec_name: str) -> None:
        self.values = values
        self.codec = codec_name
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._payload = memoryview(bytearray(codec.encoded_bytes(codec_name, len(values))))
        self._found: Difference | None = None
        self._limit = NormLimit()
        self._ready = 0.0

    async def snapshot(
        self, meeting_id: int, fragment: int, *, averaging: bool
    ) -> CompressedUpdate:
        """Quantise, and keep what the partner will decode."""
        await asyncio.to_thread(self._snapshot)
        self._ready = time.perf_counter()
        stamp = received_stamp("off", 0)
        return CompressedUpdate(self._payload, self.codec, len(self.values), 0, stamp)

    async def verify(self, meeting_id: int, exchange_id: int, update: PeerUpdate) -> float:
        """Decode and bound the partner's."""
        self.seconds["swap"] += time.perf_counter() - self._ready
        return await asyncio.to_thread(self._verify, update)

    async def merge(self, meeting_id: int, weights: dict[int, float]) -> None:
        """Merge what was verified: theta += w z."""
        (weight,) = weights.values()
        await asyncio.to_thread(self._merge, weight)

    def drop(self, meeting_id: int) -> None:
        """Nothing is kept."""

    def _snapshot(self) -> None:
        with self._timed("encode"):
            codec.encode_into(self.codec, self.values, self._payload)

    def _verify(self, update: PeerUpdate) -> float:
        with self._timed("difference"):
            self._found = difference(
                self.codec, self._payload, update.payload, update.num_values, [self._limit], 0
            )
        return self._found.distance

    def _merge(self, weight: float) -> None:
        assert self._found is not None
        with self._timed("merge"):
            self.values.add_(self._found.values[0], alpha=weight)

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start
