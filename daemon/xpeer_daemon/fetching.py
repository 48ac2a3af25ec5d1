"""Gathers the pieces of the swarm's parameters from several donors at once.

Each donor has a worker that asks for some pieces in a row. A donor that is lost gives back what it
owes, and the others go on with it; it is looked for again meanwhile. When nothing is left to ask
for, idle workers ask for what others still owe, so that a slow donor holds up nobody.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from xpeer.errors import PeerError, Reason
from xpeer.identity import PeerId
from xpeer.network.donation import BROKE
from xpeer.network.giving import Giver
from xpeer.status import Fetching
from xpeer_daemon.gathered import Gathered

log = logging.getLogger("xpeer.daemon")

RUN: Final = 16
"""Pieces that a donor is asked for at once."""
LAST_RUN: Final = 2
"""Pieces that another donor owes, of which an idle worker asks for so many at once."""
AGAIN_WITHIN_S: Final = 60.0
"""A donor whose link broke is looked for so long."""
PAUSE_S, PAUSE_MOST_S = 1.0, 8.0
"""Between two tries: at first, and at most."""
SPEED_OVER_S: Final = 20.0
"""The speed that status shows is the mean of so long."""


class Speed:
    """Bytes per second over the last while.

    Args:
        clock: monotonic, seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque([(clock(), 0)])
        """When, and how many bytes had come by then."""

    def moved(self, num_bytes: int) -> None:
        """Count bytes that came now."""
        now = self._clock()
        self._seen.append((now, self._seen[-1][1] + num_bytes))
        while len(self._seen) > 2 and now - self._seen[1][0] > SPEED_OVER_S:
            self._seen.popleft()

    @property
    def bytes_per_s(self) -> float:
        """The mean of the last while; 0 = nothing came."""
        began, before = self._seen[0]
        seconds = self._clock() - began
        return (self._seen[-1][1] - before) / seconds if seconds > 0 else 0.0


class Fetch:
    """One attempt to gather everything, from donors that were chosen.

    Args:
        gathered: gets the pieces.
        again: links to a donor again, after its link broke.
        lost: is told of a donor at fault, or gone for good.
        on_piece: called after every piece.
    """

    def __init__(
        self,
        gathered: Gathered,
        again: Callable[[Giver], Awaitable[Giver]],
        lost: Callable[[PeerId, PeerError], None],
        on_piece: Callable[[], None],
    ) -> None:
        self._gathered, self._again = gathered, again
        self._lost, self._on_piece = lost, on_piece
        self._speed = Speed()
        self._owed: Counter[int] = Counter()
        """How many workers have asked for a piece that is not here."""
        self._writing: set[int] = set()
        self._working: set[PeerId] = set()
        """Donors that have a link."""

    @property
    def progress(self) -> Fetching:
        """How far it is."""
        here, total = self._gathered.num_bytes, self._gathered.shape.num_bytes
        speed = self._speed.bytes_per_s
        return Fetching(
            bytes_done=here,
            bytes_total=total,
            bytes_per_s=speed,
            eta_s=(total - here) / speed if speed else None,
            donors=sorted(self._working),
        )

    async def run(self, givers: list[Giver]) -> bool:
        """Gather, until everything is here or all donors are lost.

        Returns:
            Whether everything is here. What came is kept in any case.

        Raises:
            LocalError: the disk is full, or fails.
        """
        workers = {asyncio.create_task(self._work(giver)) for giver in givers}
        try:
            while workers and self._gathered.missing():
                done, workers = await asyncio.wait(workers, return_when=asyncio.FIRST_COMPLETED)
                for worker in done:
                    worker.result()  # a fault of ours
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        return not self._gathered.missing()

    async def _work(self, giver: Giver) -> None:
        """Have one donor give pieces until none is left, or it is lost."""
        link: Giver | None = giver
        while link is not None and self._gathered.missing():
            try:
                self._gathered.adopt(link.tree)
                self._working.add(link.donor)
                await self._use(link)
                await link.close()
                return
            except PeerError as e:
                link.refuse()
                self._working.discard(link.donor)
                link = await self._find_again(link, e)
            except BaseException:
                link.refuse()
                raise
            finally:
                self._working.discard(giver.donor)

    async def _use(self, giver: Giver) -> None:
        while run := self._next_run():
            self._owed.update(run)
            try:
                async with contextlib.aclosing(giver.pieces(run[0], len(run))) as coming:
                    async for piece, data in coming:
                        await self._keep(piece, data, giver)
            finally:
                self._owed.subtract(run)

    async def _keep(self, piece: int, data: memoryview, giver: Giver) -> None:
        if self._gathered.has(piece) or piece in self._writing:
            return  # another donor was faster
        self._writing.add(piece)
        try:
            await _to_its_end(asyncio.to_thread(self._gathered.write, piece, data))
            self._gathered.wrote(piece, giver.tree)
        finally:
            self._writing.discard(piece)
        self._speed.moved(len(data))
        self._on_piece()

    def _next_run(self) -> range:
        """The next pieces to ask a donor for; empty = there are none."""
        missing = [p for p in self._gathered.missing() if p not in self._writing]
        free = [piece for piece in missing if not self._owed[piece]]
        if free:
            return _in_a_row(free[0], free, min(RUN, -(-len(free) // 2)))
        late = [piece for piece in missing if self._owed[piece] == 1]
        if not late:
            return range(0)
        return _in_a_row(late[-min(LAST_RUN, len(late))], late, LAST_RUN)

    async def _find_again(self, giver: Giver, broke: PeerError) -> Giver | None:
        """Link to a donor again whose link broke; None = it is at fault, or gone for good."""
        if broke.reason not in BROKE:
            self._lost(giver.donor, broke)
            return None
        log.info("the link to donor %s broke: %s", giver.donor[-8:], broke)
        clock = asyncio.get_running_loop().time
        until, pause_s = clock() + AGAIN_WITHIN_S, PAUSE_S
        while self._gathered.missing() and clock() < until:
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, PAUSE_MOST_S)
            try:
                return await self._again(giver)
            except PeerError as e:
                if e.reason not in BROKE | {Reason.UNREACHABLE}:
                    self._lost(giver.donor, e)
                    return None
        self._lost(giver.donor, broke)
        return None


async def _to_its_end(writing: Coroutine[Any, Any, None]) -> None:
    """Wait for a write even if we are cancelled: its file may be closed next."""
    task = asyncio.create_task(writing)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


def _in_a_row(first: int, pieces: list[int], most: int) -> range:
    """Pieces in a row from the first on, as far as they are among these."""
    among, stop = set(pieces), first
    while stop in among and stop - first < most:
        stop += 1
    return range(first, stop)
