"""How fast a model has to be handed out and taken over: slow transfers hold places, memory, starts.

At least 64 KiB/s, or a tenth of what others reached with us if that is less: on a slow line all are
slow. Who breaks off for being slow has shown how slow, and the next one is measured by that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from xpeer.errors import PeerError, Reason
from xpeer.identity import PeerId

LEAST_BYTES_PER_S: Final = 65536.0
SHARE: Final = 0.1
GRACE_S: Final = 30.0
"""Beyond what the rate allows, for the whole transfer: the other side may still be comparing."""
SHORT_S: Final = 1.0
"""What took less says nothing: it may lie in the kernel's buffers."""
MAX_PEERS: Final = 4096


class Pace:
    """Of one transfer that has to be fast enough, from now on.

    Args:
        least: bytes/s.
        clock: monotonic, seconds.

    Attributes:
        moved: bytes so far; whoever moves them counts.
    """

    def __init__(self, least: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._least, self._clock = least, clock
        self._began = clock()
        self.moved = 0

    @property
    def seconds(self) -> float:
        """Since it began."""
        return self._clock() - self._began

    def allows_s(self, num_bytes: int) -> float:
        """How long the next bytes may take.

        Raises:
            PeerError: no longer at all.
        """
        left_s = GRACE_S + (self.moved + num_bytes) / self._least - self.seconds
        if left_s <= 0:
            raise PeerError(Reason.TIMEOUT, f"slower than {self._least / 1024:.3g} KiB/s")
        return left_s


class Rates:
    """What transfers of bulk have reached in this run, by partner."""

    def __init__(self) -> None:
        self._fastest: dict[PeerId, float] = {}

    def saw(self, peer_id: PeerId, num_bytes: int, seconds: float) -> None:
        """A transfer or an exchange, whole or broken off."""
        if num_bytes and seconds >= SHORT_S:
            rate = num_bytes / seconds
            self._fastest[peer_id] = max(rate, self._fastest.get(peer_id, 0.0))
            if len(self._fastest) > MAX_PEERS:
                del self._fastest[next(iter(self._fastest))]

    def least(self, peer_id: PeerId) -> float:
        """Bytes/s that a transfer with this partner has to reach: measured by the others, and by
        its own where there are none.
        """
        others = [rate for peer, rate in self._fastest.items() if peer != peer_id]
        seen = max(others, default=self._fastest.get(peer_id, LEAST_BYTES_PER_S / SHARE))
        return min(LEAST_BYTES_PER_S, SHARE * seen)
