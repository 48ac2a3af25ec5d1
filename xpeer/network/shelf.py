"""Snapshots of a donor's parameters, for joiners.

There are few, since each needs as much memory as the model, and a copy on the training thread.
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
"""A snapshot is fresh for this many seconds, or for this many times as long as it took to make, if
that is longer. So joiners cost at most a twentieth of the donor's time, however many they are."""
KEPT_S = 120.0
"""The snapshot of a transfer that broke off is kept for this long, unless its memory is needed."""


class Source(Protocol):
    """Gives a donor's parameters; the trainer in production."""

    async def export_state(self) -> ModelState:
        """Copy the parameters at the next step boundary."""


@dataclass(frozen=True, slots=True, eq=False)
class _Snapshot:
    source: Source
    state: ModelState
    digest: bytes


class Shelf:
    """Keeps the last snapshot while it is fresh, and one of a broken transfer while there is room.

    Only one snapshot is made at a time.

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
        """Lend a snapshot with its digest. While two are lent, no third one is made.

        Args:
            source: the trainer.
            digest: of the snapshot to lend; None = the last one, or a new one if that is not fresh.

        Raises:
            PeerError: there is no snapshot to lend, or this one is no longer held.
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
        """Keep a lent snapshot for KEPT_S, for a joiner that will ask for the rest of it."""
        self._broken = broken = self._held(source, digest)
        asyncio.get_running_loop().call_later(KEPT_S, self._give_up, broken)

    async def get(self, source: Source) -> tuple[ModelState, bytes]:
        """A snapshot of this trainer and its digest. One of an earlier trainer is never given.

        Raises:
            PeerError: there is none to give.
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
                self._kept = None  # free its memory before the next one is made
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
        """Free the last snapshot's memory, unless it is lent."""
        if self._kept is snapshot and snapshot not in self._lent:
            self._kept = None

    def _give_up(self, snapshot: _Snapshot) -> None:
        if self._broken is snapshot:
            self._broken = None
