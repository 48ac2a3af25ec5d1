"""Gathers the pieces of the swarm's parameters from several donors at once.

Each donor has a worker that asks for some pieces in a row. A donor that is lost gives back what it
owes, and the others go on with it; it is looked for again meanwhile. When nothing is left to ask
for, idle workers ask for what others still owe, so that a slow donor holds up nobody.

While fewer donors give than are wanted, others are asked: at once when one is lost, then now and
then. Only parameters that fit to what is here are taken. If there are others and nobody gives any
more, the attempt ends as soon as waiting costs more than fetching anew what is here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection
from typing import Final

from xpeer.errors import PeerError, Reason
from xpeer.identity import PeerId
from xpeer.network.giving import BROKE, Giver
from xpeer.network.pieces import Tree
from xpeer.status import Fetching
from xpeer.uncancelled import to_its_end
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
MORE_S, MORE_MOST_S = 2.0, 30.0
"""While fewer donors give than are wanted, others are asked after this time, twice as long each
time, up to this."""
SILENT_S: Final = 30.0
"""A donor that has given no piece for so long does not count, and another one takes its place."""
SPEED_OVER_S: Final = 20.0
"""The speed that status shows is the mean of so long."""


class Speed:
    """Bytes per second over the last while.

    Args:
        clock: monotonic, seconds.

    Attributes:
        highest: the highest so far, whenever bytes came; 0 = none did.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.highest = 0.0
        self._seen: deque[tuple[float, int]] = deque([(clock(), 0)])
        """When, and how many bytes had come by then."""

    def moved(self, num_bytes: int) -> None:
        """Count bytes that came now."""
        now = self._clock()
        self._seen.append((now, self._seen[-1][1] + num_bytes))
        while len(self._seen) > 2 and now - self._seen[1][0] > SPEED_OVER_S:
            self._seen.popleft()
        self.highest = max(self.highest, self.bytes_per_s)

    @property
    def bytes_per_s(self) -> float:
        """The mean of the last while; 0 = nothing came."""
        began, before = self._seen[0]
        seconds = self._clock() - began
        return (self._seen[-1][1] - before) / seconds if seconds > 0 else 0.0


class Fetch:
    """One attempt to gather everything, from donors that were chosen and others that fit.

    Args:
        gathered: gets the pieces.
        wanted: number of donors that should give at the same time.
        fits: whether pieces of a tree may be put together with those of the chosen donors.
        again: links to a donor again, after its link broke.
        more: asks all members but these for offers.
        lost: is told of a donor at fault, or gone for good.
        on_piece: is told of every piece who gave it, and its bytes.
    """

    def __init__(
        self,
        gathered: Gathered,
        wanted: int,
        *,
        fits: Callable[[Tree], bool],
        again: Callable[[Giver], Awaitable[Giver]],
        more: Callable[[Collection[PeerId]], Awaitable[list[Giver]]],
        lost: Callable[[PeerId, PeerError], None],
        on_piece: Callable[[PeerId, int], None],
    ) -> None:
        self._gathered, self._wanted, self._fits = gathered, wanted, fits
        self._again, self._more = again, more
        self._lost, self._on_piece = lost, on_piece
        self._speed = Speed()
        self._owed: Counter[int] = Counter()
        """How many workers have asked for a piece that is not here."""
        self._writing: set[int] = set()
        self._links: dict[PeerId, Giver] = {}
        """Donors that have a link."""
        self._began_at: dict[PeerId, float] = {}
        """When each donor was chosen, by the loop's clock."""
        self._heard_at: dict[PeerId, float] = {}
        """When each donor gave a piece last, or was chosen, by the loop's clock."""
        self._workers: dict[PeerId, asyncio.Task[None]] = {}
        self._ended, self._short = asyncio.Event(), asyncio.Event()
        """A worker has ended; a donor has lost its link."""

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
            donors=sorted(self._links),
        )

    @property
    def donors(self) -> list[PeerId]:
        """All that were asked for pieces and are not lost."""
        return list(self._workers)

    def took_s(self, donor: PeerId) -> float:
        """Seconds since this donor was chosen."""
        return self._now() - self._began_at[donor]

    async def run(self, givers: list[Giver]) -> bool:
        """Gather, until everything is here or all donors are lost.

        Returns:
            Whether everything is here. What came is kept in any case.

        Raises:
            LocalError: the disk is full, or fails.
        """
        for giver in givers:
            self._begin(giver)
        recruiting = asyncio.create_task(self._recruit())
        recruiting.add_done_callback(lambda _: self._ended.set())
        try:
            while self._workers and self._gathered.missing() and not recruiting.done():
                await self._ended.wait()
                self._ended.clear()
                for donor, worker in list(self._workers.items()):
                    if worker.done():
                        del self._workers[donor]
                        if not worker.cancelled():
                            worker.result()  # a fault of ours
            if recruiting.done():
                recruiting.result()
        finally:
            left = [recruiting, *self._workers.values()]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
        return not self._gathered.missing()

    # ---- donors ---------------------------------------------------------------------------------

    def _begin(self, giver: Giver) -> None:
        """Have one more donor give."""
        self._began_at[giver.donor] = self._heard_at[giver.donor] = self._now()
        worker = self._workers[giver.donor] = asyncio.create_task(self._work(giver))

        def on_end(_: object) -> None:
            giver.refuse()  # it may have been cancelled before it began
            self._ended.set()

        worker.add_done_callback(on_end)

    def _giving(self) -> list[PeerId]:
        """Donors that have a link, and gave a piece not long ago."""
        since = self._now() - SILENT_S
        return [donor for donor in self._links if self._heard_at[donor] > since]

    async def _recruit(self) -> None:
        """Ask others while fewer donors give than are wanted; returns if donors should be chosen
        anew.

        Those whose offers do not fit are not asked again: their parameters move on.
        """
        pause_s, unfit = MORE_S, set[PeerId]()
        while True:
            waits_s = pause_s
            if unfit and not self._giving():
                waits_s = min(pause_s, max(0.0, self._worth_s() - self._waited_s()))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(waits_s):
                    await self._short.wait()
            if self._short.is_set():
                self._short.clear()
                pause_s = MORE_S / 2
            giving = self._giving()
            if len(giving) >= self._wanted or (giving and not self._next_run()):
                continue
            if unfit and not giving and self._waited_s() >= self._worth_s():
                self._drop(list(self._workers), "it gives nothing, and others do not fit to it")
                return
            offers = await self._more([*self._workers, *unfit])
            fitting = [offer for offer in offers if self._fits(offer.tree)]
            unfit.update(offer.donor for offer in offers if offer not in fitting)
            chosen = fitting[: max(0, self._wanted - len(self._giving()))]
            for offer in offers:
                if offer not in chosen:
                    offer.refuse()
            if chosen:
                self._drop_silent(len(self._links) + len(chosen) - self._wanted)
                for giver in chosen:
                    log.info("%s gives parameters, too", giver.donor[-8:])
                    self._begin(giver)
                pause_s = MORE_S
                continue
            pause_s = min(2 * pause_s, MORE_MOST_S)

    def _drop_silent(self, most: int) -> None:
        """Let so many silent donors go at most, those first that are silent for longest."""
        giving = self._giving()
        silent = [donor for donor in self._links if donor not in giving]
        longest = sorted(silent, key=self._heard_at.__getitem__)[: max(0, most)]
        self._drop(longest, f"it gave no piece in {SILENT_S:g} s")

    def _drop(self, donors: list[PeerId], why: str) -> None:
        """Let donors go, whether they have a link or are looked for."""
        for donor in donors:
            if not self._workers[donor].done():
                self._workers[donor].cancel()
                self._lost(donor, PeerError(Reason.TIMEOUT, why))

    def _waited_s(self) -> float:
        return self._now() - max(self._heard_at.values())

    def _worth_s(self) -> float:
        """How long it takes to fetch anew what is here; at most as long as a donor is looked for.

        Speed unknown: as long.
        """
        here, speed = self._gathered.num_bytes, self._speed.highest
        if not here:
            return 0.0
        return min(AGAIN_WITHIN_S, here / speed) if speed else AGAIN_WITHIN_S

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    async def _work(self, giver: Giver) -> None:
        """Have one donor give pieces until none is left, or it is lost."""
        link: Giver | None = giver
        until: float | None = None  # end of the search for it; it is put off only if it gives
        while link is not None and self._gathered.missing():
            self._links[link.donor], heard_at = link, self._heard_at[link.donor]
            try:
                self._adopt(link)
                await self._use(link)
                await link.close()
                return
            except PeerError as e:
                link.refuse()
                del self._links[link.donor]
                if until is None or self._heard_at[link.donor] > heard_at:
                    until = self._now() + AGAIN_WITHIN_S
                    self._short.set()
                link = await self._find_again(link, e, until)
            except BaseException:
                link.refuse()
                raise
            finally:
                self._links.pop(giver.donor, None)

    def _adopt(self, link: Giver) -> None:
        """Keep a donor's tree: the first one, or another one that it offered after a break.

        Raises:
            PeerError: it does not fit to what is here (REFUSED).
        """
        if not self._fits(link.tree):
            raise PeerError(Reason.REFUSED, "other parameters than those that it offered before")
        self._gathered.adopt(link.tree, [giver.tree for giver in self._links.values()])

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
            writing = asyncio.to_thread(self._gathered.write, piece, data)
            await to_its_end(asyncio.create_task(writing))  # the file may be closed next
            self._gathered.wrote(piece, giver.tree)
        finally:
            self._writing.discard(piece)
        self._heard_at[giver.donor] = self._now()
        self._speed.moved(len(data))
        self._on_piece(giver.donor, len(data))

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

    async def _find_again(self, giver: Giver, broke: PeerError, until: float) -> Giver | None:
        """Link to a donor again whose link broke.

        Args:
            giver: its link.
            broke: why that broke.
            until: when it is given up, by the loop's clock.

        Returns:
            None if it is at fault or gone for good, or if others have taken its place.
        """
        if broke.reason not in BROKE:
            self._lost(giver.donor, broke)
            return None
        log.info("the link to donor %s broke: %s", giver.donor[-8:], broke)
        pause_s = PAUSE_S
        while self._gathered.missing() and self._now() < until:
            await asyncio.sleep(pause_s)
            if len(self._giving()) >= self._wanted:
                return None
            pause_s = min(2 * pause_s, PAUSE_MOST_S)
            try:
                async with asyncio.timeout_at(until):
                    link = await self._again(giver)
            except TimeoutError:
                break
            except PeerError as e:
                if e.reason not in BROKE | {Reason.UNREACHABLE}:
                    self._lost(giver.donor, e)
                    return None
            else:
                if self._gathered.missing() and len(self._links) < self._wanted:
                    return link
                link.refuse()  # others were faster
                return None
        if self._gathered.missing():
            self._lost(giver.donor, broke)
        return None


def _in_a_row(first: int, pieces: list[int], most: int) -> range:
    """Pieces in a row from the first on, as far as they are among these."""
    among, stop = set(pieces), first
    while stop in among and stop - first < most:
        stop += 1
    return range(first, stop)
