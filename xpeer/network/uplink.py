"""Bounds what a node sends to joiners, all together: `network.donate_mbit_s`.

Exchanges are not bounded by it. They share the line with joiners, and would have to wait.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

from xpeer.wire.messages import PIECE_BYTES

PIECE_EVERY_S: Final = 10.0
"""A joiner gives up a link on which nothing comes for `link.FRAME_TIMEOUT_S`."""


class Uplink:
    """A queue of senders, each of which waits until the bytes before it have had their time.

    Args:
        mbit_per_s: the bound; 0 = none.
        clock: monotonic, seconds.
        sleep: waits for so many seconds.
    """

    def __init__(
        self,
        mbit_per_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._bytes_per_s = mbit_per_s * 1e6 / 8
        self._clock, self._sleep = clock, sleep
        self._free_at = 0.0

    def joiners(self, most: int) -> int:
        """How many joiners can be served at once: each is sent a piece every PIECE_EVERY_S.

        Args:
            most: the number without a bound.
        """
        if not self._bytes_per_s:
            return most
        return max(1, min(most, int(self._bytes_per_s * PIECE_EVERY_S / PIECE_BYTES)))

    async def take(self, num_bytes: int) -> None:
        """Wait until so many bytes may be sent."""
        if not self._bytes_per_s:
            return
        now = self._clock()
        begins = max(now, self._free_at)
        self._free_at = begins + num_bytes / self._bytes_per_s
        await self._sleep(begins - now)
