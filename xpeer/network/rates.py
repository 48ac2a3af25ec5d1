"""The least speed of a donation. A slow one blocks a place and memory, and delays a start.

The bound is 64 KiB/s, or a tenth of what other peers reached with us if that is less: on a slow
line all transfers are slow. The speed of a transfer that was broken off counts as measured, too,
and the bound of the next one follows from it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Final

from xpeer.errors import PeerError, Reason
from xpeer.identity import PeerId

LEAST_BYTES_PER_S: Final = 65536.0
SHARE: Final = 0.1
GRACE_S: Final = 30.0
"""Extra time for the whole transfer, since the other side may still compare offers."""
SHORT_S: Final = 1.0
"""A shorter transfer says nothing about speed: it may lie in the kernel's buffers."""
MAX_PEERS: Final = 4096


class Pace:
    """Bounds the time of one transfer, from now on.

    Args:
        least: speed that it has to reach, bytes/s.
        clock: monotonic, seconds.

    Attributes:
        moved: bytes so far, counted by the code that moves them.
    """

    def __init__(self, least: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._least, self._clock = least, clock
        self._began = clock()
        self.moved = 0

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Stop its clock meanwhile: nobody waits for the other side."""
        began = self._clock()
        try:
            yield
        finally:
            self._began += self._clock() - began

    @property
    def seconds(self) -> float:
        """Seconds since the transfer began, without rests."""
        return self._clock() - self._began

    def allows_s(self, num_bytes: int) -> float:
        """Seconds that the next bytes may take.

        Raises:
            PeerError: the transfer is too slow already.
        """
        left_s = GRACE_S + (self.moved + num_bytes) / self._least - self.seconds
        if left_s <= 0:
            raise PeerError(Reason.TIMEOUT, f"slower than {self._least / 1024:.3g} KiB/s")
        return left_s


class Rates:
    """The highest speed of bulk with each partner in this run; at most MAX_PEERS partners."""

    def __init__(self) -> None:
        self._fastest: dict[PeerId, float] = {}

    def saw(self, peer_id: PeerId, num_bytes: int, seconds: float) -> None:
        """Note the speed of a transfer or an exchange, whether it was completed or broke off."""
        if num_bytes and seconds >= SHORT_S:
            rate = num_bytes / seconds
            self._fastest[peer_id] = max(rate, self._fastest.get(peer_id, 0.0))
            if len(self._fastest) > MAX_PEERS:
                del self._fastest[next(iter(self._fastest))]

    def least(self, peer_id: PeerId) -> float:
        """Bytes/s that a transfer with this partner has to reach.

        They follow from the fastest other partner, or from this one's own speed if there is none.
        """
        others = [rate for peer, rate in self._fastest.items() if peer != peer_id]
        fastest = max(others, default=self._fastest.get(peer_id, LEAST_BYTES_PER_S / SHARE))
        return min(LEAST_BYTES_PER_S, SHARE * fastest)
