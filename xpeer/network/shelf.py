"""Snapshots of a donor's parameters, for joiners: few, since each takes as much memory as the
model, and a copy on the training thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

from xpeer.errors import PeerError, Reason
from xpeer.identity import blake2b
from xpeer.update import ModelState

FRESH_S, FRESH_COST = 20.0, 20.0
"""A snapshot is handed out for so long, or for so many times as long as it took: joiners, however
many, cost a twentieth of the donor's time at most."""
KEPT_S = 120.0
"""One that was broken off in the middle is kept so long for whoever has half of it, unless the room
is needed."""


class Source(Protocol):
    """Where a donor's parameters come from; the trainer in production."""

    async def export_state(self) -> ModelState:
        """Parameters at the next step boundary."""


@dataclass(frozen=True, slots=True, eq=False)
class _Snapshot:
    source: Source
    state: ModelState
    digest: bytes


class Shelf:
    """The last snapshot, while it is fresh; one at a time is taken. And one that somebody has half
    of, as long as there is room.

    Args:
        clock: monotonic, seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = asyncio.Lock()
        self._kept: _Snapshot | None = None
        self._until = 0.0
        self._lent: list[_Snapshot] = []
        self._broken: _Snapshot | None = None

    @contextlib.asynccontextmanager
    async def lend(
        self, source: Source, digest: bytes | None = None
    ) -> AsyncIterator[tuple[ModelState, bytes]]:
        """As `get`; while it is lent no third one is taken.

        Args:
            source: the trainer.
            digest: of the one that is meant; None = the last.

        Raises:
            PeerError: it has none to give, or no longer this one.
        """
        lent = await self._last(source) if digest is None else self._held(source, digest)
        self._lent.append(lent)
        try:
            yield lent.state, lent.digest
        finally:
            self._lent.remove(lent)
            if self._clock() >= self._until:
                self._forget(lent)

    def keep(self, source: Source, digest: bytes) -> None:
        """While it is lent: somebody will ask for the rest of it."""
        self._broken = broken = self._held(source, digest)
        asyncio.get_running_loop().call_later(KEPT_S, self._give_up, broken)

    async def get(self, source: Source) -> tuple[ModelState, bytes]:
        """A snapshot of this trainer, and its digest; of none before it.

        Raises:
            PeerError: it has none to give.
        """
        last = await self._last(source)
        return last.state, last.digest

    async def _last(self, source: Source) -> _Snapshot:
        async with self._lock:
            kept = self._kept
            if kept is not None and kept.source is not source:
                kept = self._kept = None
            if len(set(self._lent)) > 1:
                if kept is None:
                    raise PeerError(Reason.BUSY, "two snapshots are on their way already")
            elif kept is None or self._clock() >= self._until:
                self._kept = None  # free it before there are two
                if self._lent:
                    self._broken = None
                began = self._clock()
                state = await source.export_state()
                digest = await asyncio.to_thread(blake2b, state.payload)
                now = self._clock()
                self._until = now + max(FRESH_S, FRESH_COST * (now - began))
                kept = self._kept = _Snapshot(source, state, digest)
                asyncio.get_running_loop().call_later(self._until - now, self._forget, kept)
            return kept

    def _held(self, source: Source, digest: bytes) -> _Snapshot:
        for held in (self._kept, self._broken, *self._lent):
            if held is not None and held.digest == digest and held.source is source:
                return held
        raise PeerError(Reason.NOT_READY, "that snapshot is no longer held")

    def _forget(self, snapshot: _Snapshot) -> None:
        """It takes as much memory as the model."""
        if self._kept is snapshot and snapshot not in self._lent:
            self._kept = None

    def _give_up(self, snapshot: _Snapshot) -> None:
        if self._broken is snapshot:
            self._broken = None
