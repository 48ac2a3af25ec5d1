"""Shared memory between daemon and trainer: payload slots, and one region for a whole model.

The memory is an anonymous file, whose descriptor the child inherits. It has no name, so a crash
leaves nothing to clean up. The daemon owns all of it and hands out slots. The child reads and
writes only where a command says. A page takes memory from its first use on; the pages of the
model's region are given back after each use.

Readers never trust the content: sizes come from the reader's own manifest.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass

import numpy as np

from xpeer.errors import LocalError, TrainerError
from xpeer.forms import Form
from xpeer.manifest import Manifest
from xpeer.mixing.cut import largest
from xpeer.uncancelled import to_its_end

NUM_SLOTS = 8
_PAGE = mmap.PAGESIZE
_COPY_BYTES = 4 << 20
"""Bytes copied at a time, by a thread."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes and offsets in the arena; the same in both processes."""

    slot_bytes: int
    """Bytes for one compressed fragment."""
    state_bytes: int
    """Bytes for all parameters, the trained ones in float32."""
    num_slots: int = NUM_SLOTS

    @classmethod
    def of(cls, manifest: Manifest) -> Layout:
        """Compute the sizes that a manifest's payloads and parameters need."""
        num_params, rules = manifest.model.num_params, manifest.round
        most = rules.policy.vectors * largest(num_params, rules.fragments)
        room = Form(rules.payload_codec, most).num_bytes
        return cls(slot_bytes=room, state_bytes=manifest.state_form.most_bytes)

    @property
    def total_bytes(self) -> int:
        """Size of the file."""
        return self.num_slots * _pages(self.slot_bytes) + _pages(self.state_bytes)

    @property
    def state_start(self) -> int:
        """Offset of the model's region; a multiple of the page size."""
        return self.num_slots * _pages(self.slot_bytes)

    def slot_start(self, slot: int) -> int:
        """Offset of a slot.

        Raises:
            LocalError: no such slot.
        """
        if not 0 <= slot < self.num_slots:
            raise LocalError(f"arena slot {slot} does not exist: there are {self.num_slots}")
        return slot * _pages(self.slot_bytes)


class Arena:
    """One process's view of the memory: the daemon's by `create`, the trainer's by `attach`."""

    def __init__(self, layout: Layout, fd: int) -> None:
        self.layout = layout
        self.fd = fd
        self._closed = False
        self._map = mmap.mmap(fd, layout.total_bytes)
        self._view = memoryview(self._map)

    @classmethod
    def create(cls, layout: Layout) -> Arena:
        """Make a new, empty arena, whose `fd` the child inherits.

        Raises:
            LocalError: the system has no shared memory for it.
        """
        try:
            fd = _anonymous_file()
            os.ftruncate(fd, layout.total_bytes)
            return cls(layout, fd)
        except OSError as e:
            raise LocalError(
                f"no shared memory of {layout.total_bytes} bytes: {e.strerror}",
                "free memory, or train a smaller model",
            ) from e

    @classmethod
    def attach(cls, layout: Layout, fd: int) -> Arena:
        """Open the arena behind an inherited descriptor.

        Raises:
            LocalError: it is too small for the layout.
        """
        if os.fstat(fd).st_size < layout.total_bytes:
            raise LocalError("the shared memory is smaller than daemon and trainer agreed")
        return cls(layout, fd)

    def slot(self, slot: int, num_bytes: int) -> memoryview:
        """The first bytes of a slot, writable.

        Raises:
            LocalError: the slot does not exist, or is smaller.
        """
        start = self.layout.slot_start(slot)
        if not 0 <= num_bytes <= self.layout.slot_bytes:
            raise LocalError(f"{num_bytes} bytes do not fit a slot of {self.layout.slot_bytes}")
        return self._opened()[start : start + num_bytes]

    def state(self) -> memoryview:
        """The model's region, writable."""
        start = self.layout.state_start
        return self._opened()[start : start + self.layout.state_bytes]

    def release_state(self) -> None:
        """Give the region's memory back to the system; it reads as zeros from then on."""
        if hasattr(mmap, "MADV_REMOVE") and not self._closed:
            self._map.madvise(
                mmap.MADV_REMOVE, self.layout.state_start, _pages(self.layout.state_bytes)
            )

    def close(self) -> None:
        """Unmap; the memory is freed once the other process has done so, too.

        A view that a caller still holds keeps the mapping alive until it is gone.
        """
        if self._closed:
            return
        self._closed = True
        os.close(self.fd)
        with contextlib.suppress(BufferError):
            self._view.release()
            self._map.close()

    def _opened(self) -> memoryview:
        if self._closed:
            raise TrainerError("the trainer process is gone", "see the log")
        return self._view


class Slots:
    """Hands out slots; callers wait while none is free. Belongs to one event loop."""

    def __init__(self, num_slots: int) -> None:
        self._free = list(range(num_slots))
        self._available = asyncio.Semaphore(num_slots)

    @contextlib.asynccontextmanager
    async def one(self) -> AsyncIterator[int]:
        """Lend a slot for the duration of the block."""
        async with self._available:
            slot = self._free.pop()
            try:
                yield slot
            finally:
                self._free.append(slot)


async def copy_in_parts(source: memoryview, target: memoryview) -> None:
    """Copy many bytes without holding up the event loop, also if the source is a mapped file.

    A page that is not in memory is read from the disk when it is copied, so a thread copies, and
    numpy lets go of Python's lock meanwhile. Nothing is written any more when this returns or is
    cancelled.
    """
    loop = asyncio.get_running_loop()
    for start in range(0, source.nbytes, _COPY_BYTES):
        part = slice(start, min(start + _COPY_BYTES, source.nbytes))
        await to_its_end(loop.run_in_executor(None, _copy, source[part], target[part]))


def _copy(source: memoryview, target: memoryview) -> None:
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("xpeer-arena", os.MFD_CLOEXEC)
    fd, path = tempfile.mkstemp(prefix="xpeer-arena-")
    os.unlink(path)  # noqa: PTH108 - Path.unlink would be the same call
    return fd


def _pages(num_bytes: int) -> int:
    """Bytes of as many whole pages as are needed, at least one: a mapping can't be empty."""
    return max(1, -(-num_bytes // _PAGE)) * _PAGE
