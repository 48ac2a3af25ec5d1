"""Dialling seeds and known members: late, again, and for ever.

A seed that is down never stops a peer; two halves of a split DHT find together, since the seeds are
dialled while all is well, too. Knows nothing of sockets: it is given whom to dial and how.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable

from xpeer.errors import PeerError
from xpeer.identity import PeerId

log = logging.getLogger("xpeer.network")

FIRST_RETRY_S, LONGEST_RETRY_S = 1.0, 60.0
HEALTHY_RETRY_S = 60.0
HEALTHY_TARGETS = 4
"""Dialled while somebody answers, of all that might be; drawn anew each time."""
SETTLE_EVERY = 5
"""Times that somebody answered: looking for neighbours asks a dozen nodes, and they last."""
MAX_SKEW_S = 3.0
"""hivemind's bound. Records live for 40 s, and slots follow the clock: more costs exchanges."""


class Bootstrapping:
    """The loop, and what it has found.

    Args:
        targets: whom to dial now, and where that is; none = nobody is known, which is no failure.
        dial: connect, introduce, ping; returns by how many seconds the peer's clock is ahead.
        settle: look for neighbours, after somebody answered.

    Attributes:
        reached: set while somebody answers us.
        note: why nobody does, or what is wrong although somebody does, for the operator.
    """

    def __init__(
        self,
        targets: Callable[[], dict[PeerId, str]],
        dial: Callable[[PeerId], Awaitable[float]],
        settle: Callable[[], Awaitable[None]],
    ) -> None:
        self.reached = asyncio.Event()
        self.note = ""
        self._targets = targets
        self._dial = dial
        self._settle = settle
        self._again = asyncio.Event()
        self._answered = 0

    def lost(self) -> None:
        """Nobody can be reached at the moment."""
        self.reached.clear()

    def again(self) -> None:
        """Dial now, without waiting for the next time."""
        self._again.set()

    async def run(self) -> None:
        """Dial until cancelled."""
        delay_s = FIRST_RETRY_S
        while True:
            self._again.clear()
            try:
                reached = await self.once()
            except Exception:  # of a DHT node that is being replaced, or a bug: the loop goes on
                log.exception("dialling the seeds failed")
                reached = False
            if reached:
                self.reached.set()
                wait_s, delay_s = HEALTHY_RETRY_S, FIRST_RETRY_S
            else:
                self.reached.clear()
                wait_s, delay_s = delay_s, min(2 * delay_s, LONGEST_RETRY_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._again.wait()

    async def once(self) -> bool:
        """Dial everybody, or some while all is well; whether somebody answered."""
        targets = self._targets()
        if not targets:
            self._say("")
            return True
        if self.reached.is_set() and len(targets) > HEALTHY_TARGETS:
            targets = dict(random.sample(list(targets.items()), HEALTHY_TARGETS))
        elif not self.reached.is_set():
            self._answered = 0
        answers = await asyncio.gather(*(self._try(*target) for target in targets.items()))
        failures = [answer for answer in answers if isinstance(answer, str)]
        if len(failures) == len(targets):
            self._say(f"no seed answers: {failures[0]}")
            return False
        self._say(_of_clocks([answer for answer in answers if isinstance(answer, float)]))
        if self._answered % SETTLE_EVERY == 0:
            await self._settle()
        self._answered += 1
        return True

    async def _try(self, peer_id: PeerId, address: str) -> float | str:
        try:
            return await self._dial(peer_id)
        except PeerError as e:
            return f"{address}: {e}"

    def _say(self, note: str) -> None:
        if note and note != self.note:
            log.warning("%s", note)
        self.note = note


def _of_clocks(ahead_s: list[float]) -> str:
    """What is wrong with our clock, if most of those who answered disagree with it."""
    median_s = sorted(ahead_s)[len(ahead_s) // 2]
    if abs(median_s) <= MAX_SKEW_S:
        return ""
    how = "behind" if median_s > 0 else "ahead of"
    return f"this node's clock is {abs(median_s):.0f} s {how} the others': synchronise it (NTP)"
