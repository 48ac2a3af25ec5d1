"""Dialling seeds and known members, again and again, as long as the node runs.

A seed that is down never stops a node. Seeds are dialled while all is well, too, so that a split
DHT rejoins. This module knows nothing of sockets: its caller says whom to dial, and how.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Awaitable, Callable, Collection
from typing import NamedTuple

from xpeer.errors import PeerError
from xpeer.identity import PeerId

log = logging.getLogger("xpeer.network")

FIRST_RETRY_S, LONGEST_RETRY_S = 1.0, 60.0
HEALTHY_RETRY_S = 60.0
HEALTHY_TARGETS = 4
"""How many targets are dialled while somebody answers; drawn anew each time."""
NEIGHBOURS_EVERY = 5
"""Neighbours are looked for at every fifth successful round of dials. A search asks a dozen nodes,
and its result stays good for a while."""
MAX_SKEW_S = 3.0
"""hivemind's bound. Records live for 40 s, and slots follow the clock: more costs exchanges."""


class Answer(NamedTuple):
    """The answer to a dial."""

    ahead_s: float
    """Seconds by which the peer's clock is ahead of ours."""
    called_back: bool = True
    """Whether the peer could call us."""


class Bootstrapping:
    """Dials in a loop, and keeps what the last dials showed.

    Args:
        targets: returns the peers to dial now, with their addresses. An empty result means that
            nobody is known; that is no failure.
        dial: connects, introduces us and pings.
        find_neighbours: looks for DHT nodes near us, after somebody answered.
        seeds: the peers that our operator named.

    Attributes:
        reached: set while somebody answers us.
        note: why nobody answers, or that our clock is wrong, for the operator. Empty: all is well.
        clock_ahead_s: seconds by which our clock is ahead of the median of the last answers.
        clocks: number of peers in the last answers.
        unheard: number of them that could not call us back.
    """

    def __init__(
        self,
        targets: Callable[[], dict[PeerId, str]],
        dial: Callable[[PeerId], Awaitable[Answer]],
        find_neighbours: Callable[[], Awaitable[None]],
        seeds: Collection[PeerId] = (),
    ) -> None:
        self.reached = asyncio.Event()
        self.note = ""
        self._targets = targets
        self._dial = dial
        self._find_neighbours = find_neighbours
        self._seeds = seeds
        self._failures: dict[PeerId, str] = {}
        self.clock_ahead_s = 0.0
        self.clocks = self.unheard = 0
        self._again = asyncio.Event()
        self._answered = 0

    @property
    def silent_seeds(self) -> str:
        """The first seed's failure, if every seed failed when it was last dialled; else empty."""
        failures = [self._failures.get(seed, "") for seed in self._seeds]
        return failures[0] if failures and all(failures) else ""

    def lost(self) -> None:
        """Note that nobody can be reached at the moment."""
        self.reached.clear()

    def again(self) -> None:
        """Dial now, without waiting for the next turn."""
        self._again.set()

    async def run(self) -> None:
        """Dial until cancelled."""
        delay_s = FIRST_RETRY_S
        while True:
            self._again.clear()
            try:
                reached = await self.once()
            except Exception:  # the DHT node is being replaced, or a bug: the loop goes on
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
        """Dial all targets, or only some while all is well.

        Returns:
            True if somebody answered, or if there is nobody to dial.
        """
        targets = self._targets()
        if not targets:
            self._say("")
            return True
        if self.reached.is_set() and len(targets) > HEALTHY_TARGETS:
            targets = self._some(targets)
        elif not self.reached.is_set():
            self._answered = 0
        answers = await asyncio.gather(*(self._try(*target) for target in targets.items()))
        failures = [answer for answer in answers if isinstance(answer, str)]
        if len(failures) == len(targets):
            self._say(f"no seed answers: {failures[0]}")
            return False
        heard = [answer for answer in answers if isinstance(answer, Answer)]
        self.unheard = sum(not answer.called_back for answer in heard)
        ahead_s = sorted(answer.ahead_s for answer in heard)
        self.clock_ahead_s, self.clocks = -ahead_s[len(ahead_s) // 2], len(ahead_s)
        self._say(_of_clocks(self.clock_ahead_s))
        if self._answered % NEIGHBOURS_EVERY == 0:
            await self._find_neighbours()
        self._answered += 1
        return True

    def _some(self, targets: dict[PeerId, str]) -> dict[PeerId, str]:
        """Draw a few targets, one of them a seed, so that we notice when the seeds are gone."""
        seeds = [peer for peer in targets if peer in self._seeds]
        chosen = random.sample(seeds, min(1, len(seeds)))
        others = [peer for peer in targets if peer not in chosen]
        chosen += random.sample(others, HEALTHY_TARGETS - len(chosen))
        return {peer: targets[peer] for peer in chosen}

    async def _try(self, peer_id: PeerId, address: str) -> Answer | str:
        try:
            answer = await self._dial(peer_id)
        except PeerError as e:
            if peer_id in self._seeds:
                self._failures[peer_id] = f"{address}: {e}"
            return f"{address}: {e}"
        self._failures.pop(peer_id, None)
        return answer

    def _say(self, note: str) -> None:
        if note and note != self.note:
            log.warning("%s", note)
        self.note = note


def _of_clocks(ahead_s: float) -> str:
    """The operator's warning that our clock is off by more than MAX_SKEW_S; empty if it is not."""
    if abs(ahead_s) <= MAX_SKEW_S:
        return ""
    how = "behind" if ahead_s < 0 else "ahead of"
    return f"this node's clock is {abs(ahead_s):.0f} s {how} the others': synchronise it (NTP)"
