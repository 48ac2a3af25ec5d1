"""The pieces that a node gathers from its donors, from the first one to their import."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from enum import Enum
from pathlib import Path
from typing import Final

from xpeer.errors import LocalError, PeerError, Reason
from xpeer.identity import PeerId
from xpeer.network import giving
from xpeer.network.agreement import Dialler, Party
from xpeer.network.giving import BROKE, WORTH, Giver
from xpeer.network.pieces import Shape, Signer, Tree
from xpeer.network.rates import Rates
from xpeer.status import Fetching
from xpeer_daemon.fetching import Fetch
from xpeer_daemon.gathered import Gathered, remove
from xpeer_daemon.life import Life

log = logging.getLogger("xpeer.daemon")

LEASE_SHARE: Final = 0.05
"""A node goes on fetching from the same donors as long as this fraction of the parameters comes
within `donors.CATCH_UP_S`; without a checkpoint of its own also if nobody else could give."""
_LIES: Final = frozenset(
    {Reason.TAMPERED, Reason.DIGEST_MISMATCH, Reason.MALFORMED, Reason.OVERSIZE}
)
"""Reasons after which a donor's pieces are forgotten."""


class Ended(Enum):
    """How an attempt to gather everything ended."""

    WHOLE = "all pieces are here"
    SOME = "all donors were lost; at least WORTH more of the model is here than ever before"
    LITTLE = "all donors were lost, and less came, or it took the place of other pieces"
    LATE = "too little came in time"
    CUT = "our own time was over before the donors had had theirs"


class Takeover:
    """Gathers parameters in the home, over as many attempts as it takes.

    Args:
        party: our identity and keys.
        dialler: opens streams.
        shape: of the parameters, by the manifest.
        rates: speeds of transfers so far.
        folder: for the pieces.
        life: gets note and progress.
        avoid: is told of donors that failed, why, and what time that cost.
        spare: is told of donors that were lost, but gave WORTH of the model since the last time.

    Attributes:
        came: pieces that came since the start, or since they were forgotten.
    """

    def __init__(
        self,
        party: Party,
        dialler: Dialler,
        shape: Shape,
        rates: Rates,
        folder: Path,
        life: Life,
        avoid: Callable[[PeerId, str, float], None],
        spare: Callable[[PeerId, str], None],
    ) -> None:
        self._party, self._dialler = party, dialler
        self._shape, self._rates = shape, rates
        self._folder, self._life = folder, life
        self._avoid, self._spare = avoid, spare
        self._gave: Counter[PeerId] = Counter()
        """Bytes that donors gave since they were spared last."""
        self._gathered: Gathered | None = None
        """None until the first donor was chosen, and again once the parameters are taken over."""
        self.came = 0
        self._most = 0
        """Bytes of pieces that were here when an attempt began, at most: who gives some of one
        snapshot after another, none of which fits to the last one, gets nowhere."""
        self._liars: set[PeerId] = set()
        """Donors whose pieces were forgotten since they lied. What they took along is no fault of
        others, who have to give no more than before to go on; but only once for each liar."""
        self._expired: Counter[PeerId] = Counter()
        """How often too little came in time, by the donor that was chosen first. Each doubles that
        time: slow lines get through. Liars double their own time alone."""

    async def ask(self, donor: PeerId) -> Giver:
        """Ask a donor for its tree: the one of which pieces are here, if it still has that.

        Raises:
            PeerError: see `giving.ask`.
        """
        root = next((tree.root for tree in self.trees() if tree.donor == donor), None)
        return await giving.ask(self._party, self._dialler, donor, self._shape, self._rates, root)

    def bytes_of(self, tree: Tree) -> int:
        """Bytes of a tree's pieces that are here."""
        return self._gathered.bytes_of(tree) if self._gathered is not None else 0

    def trees(self) -> list[Tree]:
        """Of which pieces are here, the one with the most of them first."""
        return self._gathered.sources() if self._gathered is not None else []

    async def recall(self) -> None:
        """Find what an earlier start left, so that its donors are asked for the rest of it."""
        if self._folder.exists():
            with contextlib.suppress(LocalError):  # `gather` raises it, too
                await self._opened()

    async def gather(
        self,
        givers: list[Giver],
        wanted: int,
        fits: Callable[[Tree], bool],
        more: Callable[[Collection[PeerId]], Awaitable[list[Giver]]],
        until: float | None,
        lease_s: float,
        others_offer: Callable[[Collection[PeerId]], Awaitable[bool]],
    ) -> Ended:
        """Fetch the pieces that are not here yet. What came is kept in any case.

        Args:
            givers: donors to fetch from, the best one first.
            wanted: number of donors that should give at the same time.
            fits: whether pieces of a tree may be put together with theirs; others are set aside,
                and come back unless theirs took their places.
            more: asks all members but these for offers.
            until: end by the loop's clock; it is put off while enough comes. None = this node has
                no parameters of its own: it ends only if others offer some, after `lease_s`, and
                after twice that time if too little comes again.
            lease_s: while enough comes, the end is put off by so much.
            others_offer: asks whether any member but these offers something now. Who is on the
                roster, and gives nothing, takes nobody's place.

        Raises:
            LocalError: the disk is full, or fails.
        """
        gathered, first = await self._opened(), givers[0].donor
        clock = asyncio.get_running_loop().time
        began = clock()
        self._most = max(self._most, gathered.num_bytes)
        unfit = self._set_unfit_aside(gathered, fits)
        most = self._most if wanted > 1 else gathered.num_bytes  # who gives alone: its own
        due = gathered.num_bytes + LEASE_SHARE * self._shape.num_bytes
        if until is None:
            lease_s *= 2.0 ** self._expired[first]

        async def may_end() -> bool:
            return until is not None or await others_offer(fetch.donors)

        def on_piece(donor: PeerId, num_bytes: int) -> None:
            nonlocal due
            self.came += 1
            self._gave[donor] += num_bytes
            self._life.note = in_words(fetch.progress)
            if gathered.num_bytes >= due:
                due = gathered.num_bytes + LEASE_SHARE * self._shape.num_bytes
                lease.renew()

        def on_loss(donor: PeerId, error: PeerError) -> None:
            nonlocal due
            lied_before = donor in self._liars
            self._lost(donor, error)
            if donor in self._liars and not lied_before:
                due = min(due, gathered.num_bytes + LEASE_SHARE * self._shape.num_bytes)

        fetch = Fetch(
            gathered,
            wanted,
            fits=fits,
            again=lambda giver: self.ask(giver.donor),
            more=more,
            lost=on_loss,
            on_piece=on_piece,
        )
        self._life.fetching = lambda: fetch.progress
        try:
            async with asyncio.timeout(None) as limit:
                lease = _Lease(limit, until, lease_s, may_end)
                try:
                    whole = await fetch.run(givers)
                    much = gathered.num_bytes - most >= WORTH * self._shape.num_bytes
                finally:
                    lease.end()
        except TimeoutError:
            if until is not None and clock() - began < lease_s:
                return Ended.CUT
            self._came_late(fetch, first if until is None else None)
            return Ended.LATE
        finally:
            gathered.bring_back()
            self._life.fetching = None
        if whole:
            return Ended.WHOLE
        return Ended.SOME if much and first not in unfit else Ended.LITTLE

    def _came_late(self, fetch: Fetch, first: PeerId | None) -> None:
        """Avoid all donors; of `first` more time is granted the next time."""
        if first is not None:
            self._expired[first] += 1
        for donor in fetch.donors:
            self._avoid(donor, "not enough of it came in time", fetch.took_s(donor))

    @staticmethod
    def _set_unfit_aside(gathered: Gathered, fits: Callable[[Tree], bool]) -> set[PeerId]:
        """Set pieces that don't fit aside, for what is claimed may be false; forget trees without
        pieces. Returns whose did not fit.
        """
        unfit = [tree for tree in gathered.sources() if not fits(tree)]
        for tree in unfit:
            gathered.set_aside(tree)
        gathered.tidy()
        return {tree.donor for tree in unfit}

    async def payload(self) -> memoryview:
        """All pieces: (num_bytes,) uint8, only to be read."""
        return (await self._opened()).payload()

    def summary(self) -> str:
        """How many pieces there are, and how many of them this start has fetched; for people."""
        return f"{self._shape.num_pieces} pieces, {self.came} fetched since the start"

    def drop(self, donor: PeerId) -> None:
        """Forget the pieces of a donor, those that are set aside, too, and how much was here."""
        self._discard_of(donor)
        self._most = 0

    def keep_of(self, donor: PeerId | None) -> None:
        """Forget the pieces of all other donors, and how much was here."""
        for tree in self.trees():
            if tree.donor != donor:
                self._discard(tree)
        self._most = 0

    def _discard(self, tree: Tree) -> None:
        if self._gathered is not None:
            self._gathered.discard(tree)

    def _discard_of(self, donor: PeerId) -> None:
        known = list(self._gathered.trees.values()) if self._gathered is not None else []
        for tree in known:
            if tree.donor == donor:
                self._discard(tree)

    def forget(self) -> None:
        """Remove all pieces: the parameters are taken over, or are of no use."""
        if self._gathered is not None:
            self._gathered.close()
            self._gathered = None
        self.came = self._most = 0
        self._expired.clear()
        self._liars.clear()
        self._gave.clear()
        remove(self._folder)

    async def _opened(self) -> Gathered:
        if self._gathered is None:
            signer = Signer(self._party.swarm_id, self._party.manifest_hash)
            opened = await asyncio.to_thread(Gathered.open, self._folder, self._shape, signer)
            if opened.num_bytes:
                here = opened.num_bytes / 1e6
                log.info("%.1f MB of the parameters are here from an earlier start", here)
            self._gathered = opened
        return self._gathered

    def _lost(self, donor: PeerId, error: PeerError) -> None:
        """Avoid a donor for a while; forget its pieces if it has shown that it lies."""
        if error.reason in _LIES:
            self._liars.add(donor)
            self._discard_of(donor)
        if error.reason in BROKE and self._gave[donor] >= WORTH * self._shape.num_bytes:
            del self._gave[donor]
            self._spare(donor, str(error))
        else:
            self._avoid(donor, str(error), 0.0)


class _Lease:
    """Lets an attempt go on while enough comes.

    Args:
        limit: of the attempt.
        until: it does not end before, by the loop's clock; None = at any time.
        seconds: it may go on for so long, from now on and from each `renew`.
        may_end: whether it may end now; if not, it has as much time once more.
    """

    def __init__(
        self,
        limit: asyncio.Timeout,
        until: float | None,
        seconds: float,
        may_end: Callable[[], Awaitable[bool]],
    ) -> None:
        self._limit, self._seconds, self._may_end = limit, seconds, may_end
        self._loop = asyncio.get_running_loop()
        self._until = until if until is not None else 0.0
        self._ends_at = self._loop.time() + seconds if until is None else until
        self._watching = asyncio.create_task(self._watch())

    def renew(self) -> None:
        """Note that enough came."""
        self._ends_at = max(self._loop.time() + self._seconds, self._until)

    def end(self) -> None:
        """The attempt is over."""
        if not self._watching.cancel() and not self._watching.cancelled():
            self._watching.result()  # a fault of ours

    async def _watch(self) -> None:
        while True:
            if (left_s := self._ends_at - self._loop.time()) > 0:
                await asyncio.sleep(left_s)
                continue
            may_end = await self._may_end()
            if self._loop.time() < self._ends_at:
                continue  # enough came while others were asked
            if may_end:
                self._limit.reschedule(self._loop.time())
                return
            self.renew()


def in_words(progress: Fetching) -> str:
    """The progress of a transfer for people."""
    done, total = progress.bytes_done / 1e6, progress.bytes_total / 1e6
    ends = "" if progress.eta_s is None else f", about {progress.eta_s:.0f} s more"
    members = f"{len(progress.donors)} member{'' if len(progress.donors) == 1 else 's'}"
    speed = progress.bytes_per_s / 1e6
    return f"fetching: {done:.1f} of {total:.1f} MB from {members}, {speed:.1f} MB/s{ends}"
