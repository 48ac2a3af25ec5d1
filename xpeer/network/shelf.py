"""Snapshots of a donor's parameters, for joiners.

There are few, since each needs as much memory as the model, a copy on the training thread, and a
measurement beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Final, Protocol

from xpeer.errors import PeerError, Reason
from xpeer.network.pieces import leaves_of, root_of
from xpeer.update import ModelState, StateCopy

FRESH_S = 20.0
"""A snapshot is fresh for this long, unless the donor has trained more than a window since."""
FRESH_COST = 20.0
"""A snapshot is fresh for at least this many times the processor time that it cost, its measurement
included. So joiners cost the donor at most a twentieth of a core, however many they are. Waiting is
no cost: a copy that waited a minute for a core would else be handed out for twenty."""
STALE_S: Final = 900.0
"""While there are two snapshots, joiners get the last one. Once that is older than this, a joiner
that asks ends the links with one of them: else two slow joiners could freeze what this donor hands
out. It is the one of which no joiner takes as much as the fastest one does of the other."""
PREPARE_TIMEOUT_S: Final = 300.0
"""A joiner waits so long for a snapshot, which is made at a step boundary: a step of a large model
is long. Then its place is free again, whatever becomes of the snapshot."""
KEPT_S = 120.0
"""The snapshot of a transfer that broke off is kept for this long, unless its memory is needed: for
a newer one, once the last one is older than STALE_S. Who made way gets `turns.TURN_S` more."""


class Source(Protocol):
    """Gives a donor's parameters; the trainer in production."""

    @property
    def step(self) -> int:
        """Number of local steps done."""

    async def export_state(self) -> StateCopy:
        """Copy the parameters at the next step boundary."""


class Snapshot:
    """A donor's parameters, and their hashes. These are computed once, when they are asked for.

    Args:
        source: the trainer that made it.
        state: the parameters.
    """

    def __init__(self, source: Source, state: ModelState) -> None:
        self.source, self.state = source, state
        self._hashing = asyncio.Lock()
        self._leaves = b""

    async def leaves(self) -> bytes:
        """The hashes of all pieces, see `pieces.leaves_of`."""
        async with self._hashing:
            payload = memoryview(self.state.payload)
            self._leaves = self._leaves or await asyncio.to_thread(leaves_of, payload)
            return self._leaves

    def known_as(self, root: bytes) -> bool:
        """Whether this is the root of its hash tree, and somebody asked for that."""
        return bool(self._leaves) and root == root_of(self._leaves)


class _Loan:
    """A snapshot that is lent to one link.

    Args:
        snapshot: it.
        end: ends the link.
        taken: returns the bytes that its joiner took of late.
    """

    def __init__(
        self, snapshot: Snapshot, end: Callable[[], object], taken: Callable[[], int]
    ) -> None:
        self.snapshot, self.end, self.taken = snapshot, end, taken
        self.returned = asyncio.Event()


class Shelf:
    """Keeps the last snapshot while it is fresh, and one of a broken transfer while there is room.

    Only one snapshot is made at a time.

    Args:
        window_steps: of the manifest.
        clock: monotonic, seconds.
    """

    def __init__(self, window_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._window_steps, self._clock = window_steps, clock
        self._lock = asyncio.Lock()
        self._kept: Snapshot | None = None
        self._paid_at = self._until = 0.0
        """The last snapshot is fresh until `_paid_at` in any case, and until `_until` at most."""
        self._made_at = 0.0
        """When the last snapshot was made."""
        self._making: tuple[Source, asyncio.Task[Snapshot]] | None = None
        """The snapshot that is being made, and of whom."""
        self._loans: list[_Loan] = []
        self._broken: Snapshot | None = None
        self._awaited = False
        """True iff a joiner lacks pieces of the broken one."""
        self._giving_up: asyncio.TimerHandle | None = None
        """Frees the broken one's memory; None until there was one."""

    @contextlib.asynccontextmanager
    async def lend(
        self,
        source: Source,
        root: bytes | None = None,
        *,
        end: Callable[[], object],
        taken: Callable[[], int],
    ) -> AsyncIterator[Snapshot]:
        """Lend a snapshot. While two are lent, no third one is made for STALE_S.

        Args:
            source: the trainer.
            root: of the tree of the snapshot to lend; None = the last one, or a new one if that is
                not fresh.
            end: ends the link that it is lent to; the snapshot has to come back soon then.
            taken: returns the bytes that the joiner took of late.

        Raises:
            PeerError: there is no snapshot to lend, this one is no longer held, or the trainer made
                none in PREPARE_TIMEOUT_S.
        """
        lent = await self._soon(source) if root is None else self._held(source, root)
        self._loans.append(loan := _Loan(lent, end, taken))
        try:
            yield lent
        finally:
            self._loans.remove(loan)
            loan.returned.set()
            if self._clock() >= self._until:
                self._forget(lent)

    def keep(self, lent: Snapshot, for_s: float = KEPT_S, *, awaited: bool = True) -> None:
        """Keep a lent snapshot for a joiner that may ask for more of it.

        Args:
            lent: it.
            for_s: time, unless its memory is needed.
            awaited: the joiner lacks pieces, so it will ask. No other one is made in its place for
                STALE_S, and none is kept that nobody awaits.
        """
        if self._broken is not None and self._awaited and not awaited:
            return
        self._broken, self._awaited = lent, awaited
        if self._giving_up is not None:
            self._giving_up.cancel()
        self._giving_up = asyncio.get_running_loop().call_later(for_s, self._give_up)

    def holds(self, source: Source, root: bytes) -> bool:
        """Whether a snapshot of this trainer is here under this root."""
        return any(self._matching(source, root))

    def is_fresh(self, source: Source) -> bool:
        """Whether a joiner that asks now gets a snapshot that is here already."""
        kept = self._kept
        return kept is not None and kept.source is source and self._fresh(kept)

    async def get(self, source: Source) -> Snapshot:
        """A snapshot of this trainer. One of an earlier trainer is never given.

        Raises:
            PeerError: there is none to give.
        """
        return await self._last(source)

    async def _soon(self, source: Source) -> Snapshot:
        try:
            async with asyncio.timeout(PREPARE_TIMEOUT_S):
                return await self._last(source)
        except TimeoutError as e:
            raise PeerError(Reason.NOT_READY, "the trainer made no snapshot in time") from e

    async def _last(self, source: Source) -> Snapshot:
        async with self._lock:
            kept = self._kept
            if kept is not None and kept.source is not source:
                kept = self._kept = None
            if self._broken is not None and self._broken.source is not source:
                self._broken = None
            if kept is not None and self._fresh(kept):
                return kept
            lent, is_stale = self._lent(), self._clock() - self._made_at >= STALE_S
            awaited = self._broken if self._awaited else None
            if kept is not None and not is_stale and len({*lent, awaited} - {None}) > 1:
                return kept
            if len(lent) > 1 and not is_stale:
                raise PeerError(Reason.BUSY, "two snapshots are on their way already")
            await self._end_the_slower()
            self._kept = None  # free its memory before the next one is made
            if self._loans:
                self._broken = None
            return await self._made(source)

    def _lent(self) -> list[Snapshot]:
        """The snapshots that are lent, the one first that was lent first."""
        return list(dict.fromkeys(loan.snapshot for loan in self._loans))

    async def _end_the_slower(self) -> None:
        """End links until only one snapshot is lent."""
        while len(lent := self._lent()) > 1:
            slower = min(lent, key=self._most_taken)
            for loan in [loan for loan in self._loans if loan.snapshot is slower]:
                loan.end()
                await loan.returned.wait()

    def _most_taken(self, snapshot: Snapshot) -> int:
        """Bytes that the fastest joiner with a lent snapshot took of late."""
        return max(loan.taken() for loan in self._loans if loan.snapshot is snapshot)

    async def _made(self, source: Source) -> Snapshot:
        """A new snapshot, or the one that an earlier joiner did not wait for any longer."""
        making = self._making
        if making is None or making[0] is not source:
            task = asyncio.create_task(self._make(source))
            making = self._making = source, task
            task.add_done_callback(self._end_making)
        return await asyncio.shield(making[1])

    def _end_making(self, task: asyncio.Task[Snapshot]) -> None:
        if self._making is not None and self._making[1] is task:
            self._making = None
        if not task.cancelled():
            task.exception()  # mark it as seen: its joiners, if any still wait, have raised it

    async def _make(self, source: Source) -> Snapshot:
        copy = await source.export_state()
        made = self._kept = Snapshot(source, copy.state)
        now = self._made_at = self._clock()
        self._paid_at = now + FRESH_COST * copy.core_s
        self._until = max(now + FRESH_S, self._paid_at)
        asyncio.get_running_loop().call_later(self._until - now, self._forget, made)
        return made

    def _fresh(self, kept: Snapshot) -> bool:
        now, lag = self._clock(), kept.source.step - kept.state.step
        return now < self._paid_at or (now < self._until and lag <= self._window_steps)

    def _held(self, source: Source, root: bytes) -> Snapshot:
        for held in self._matching(source, root):
            return held
        raise PeerError(Reason.NOT_READY, "that snapshot is no longer held")

    def _matching(self, source: Source, root: bytes) -> Iterator[Snapshot]:
        for held in (self._kept, self._broken, *self._lent()):
            if held is not None and held.source is source and held.known_as(root):
                yield held

    def _forget(self, snapshot: Snapshot) -> None:
        """Free the last snapshot's memory, unless it is lent."""
        if self._kept is snapshot and snapshot not in self._lent():
            self._kept = None

    def _give_up(self) -> None:
        self._broken = None
