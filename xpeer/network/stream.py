"""A connected socket of ours alone: awaited for small things, used from a worker thread for bulk.

asyncio's streams cost a turn of the event loop and two copies for every 64 KiB. Here the kernel's
socket buffers are the only ones: a partner that reads slowly stops us, and one that sends slowly
costs no memory. Whoever awaits or works holds the socket open until it is done, so that a closed
descriptor is never somebody else's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Self, TypeVar, cast

from xpeer.errors import PeerError, Reason

MAX_WORKERS: Final = 64
"""Transfers in either direction at the same time; the trainer has 16 exchanges in flight at most,
and each needs two. A further one waits for its turn, and its partner for its first frame."""
SOCKET_BUFFER_BYTES: Final = 4 << 20
"""Asked of the kernel, for Unix sockets, which do not grow; it gives what its limits allow."""

_workers: Final = ThreadPoolExecutor(MAX_WORKERS, "xpeer-bulk")
_T = TypeVar("_T")


class Stream:
    """A byte stream. One reader and one writer at a time, each either awaiting or in a thread.

    Args:
        sock: connected; ours from now on.
        ahead: bytes that were read from it already.
    """

    def __init__(self, sock: socket.socket, ahead: bytes = b"") -> None:
        sock.setblocking(False)
        if sock.family == socket.AF_UNIX:
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._ahead = memoryview(ahead)
        self._users = 0
        self._shut = False

    @classmethod
    async def adopt(cls, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Self:
        """Take the socket over from asyncio, which must have nothing left to write.

        Raises:
            PeerError: it is closed already.
        """
        transport = cast(asyncio.Transport, writer.transport)
        try:
            transport.pause_reading()
            descriptor = os.dup(transport.get_extra_info("socket").fileno())
        except (OSError, RuntimeError) as e:
            raise PeerError(Reason.CLOSED, "the stream was closed before it was used") from e
        reader.feed_eof()  # then `read` gives what it holds, and waits for nothing
        ahead = await reader.read()
        transport.abort()  # closes its own descriptor; the connection lives on in ours
        return cls(socket.socket(fileno=descriptor), ahead)

    async def read(self, num_bytes: int) -> bytes:
        """Exactly so many bytes.

        Raises:
            PeerError: the stream ended (TRUNCATED) or broke (CLOSED).
        """
        loop, data = asyncio.get_running_loop(), bytearray(num_bytes)
        view = memoryview(data)
        done = self._take_ahead(view)
        with self._in_use(), _errors("receiving"):
            while done < num_bytes:
                done += _not_ended(await loop.sock_recv_into(self._sock, view[done:]))
        return bytes(data)

    def unread(self, data: bytes) -> None:
        """Give back what was read last."""
        self._ahead = memoryview(data + self._ahead)

    async def write(self, data: bytes) -> None:
        """Return once the kernel holds all of it.

        Raises:
            PeerError: the stream broke (CLOSED).
        """
        with self._in_use(), _errors("sending"):
            await asyncio.get_running_loop().sock_sendall(self._sock, data)

    async def in_thread(self, work: Callable[[], _T]) -> _T:
        """Run bulk work on this stream, off the event loop.

        Cancelling shuts the stream down and returns once the worker let go of its buffers: never
        before, since they may be shared memory that the next exchange is given.
        """
        with self._in_use():
            future = asyncio.get_running_loop().run_in_executor(_workers, work)
            try:
                return await asyncio.shield(future)
            except asyncio.CancelledError:
                self.shutdown()
                while not future.done():
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.wait([future])
                if not future.cancelled():
                    future.exception()  # else Python would log that nobody read it
                raise

    def shutdown(self) -> None:
        """End the stream at once, in both directions. Whoever waits on it gets an error."""
        if not self._shut:
            self._shut = True
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)
            self._close_if_unused()

    # In a worker thread

    def fill(self, view: memoryview, timeout_s: float) -> None:
        """Read exactly as much as fits.

        Raises:
            PeerError: not within `timeout_s` (TIMEOUT), ended (TRUNCATED), broke (CLOSED).
        """
        waiting = _Waiting(self._sock, select.POLLIN, timeout_s, "no frame in time")
        done = self._take_ahead(view)
        with _errors("receiving"):
            while done < len(view):
                waiting.wait()
                try:
                    done += _not_ended(self._sock.recv_into(view[done:]))
                except BlockingIOError:
                    continue

    def send(self, view: memoryview, timeout_s: float) -> None:
        """Write all of it.

        Raises:
            PeerError: not taken within `timeout_s` (TIMEOUT), broke (CLOSED).
        """
        waiting = _Waiting(self._sock, select.POLLOUT, timeout_s, "the partner does not read")
        done = 0
        with _errors("sending"):
            while done < len(view):
                waiting.wait()
                try:
                    done += self._sock.send(view[done:])
                except BlockingIOError:
                    continue

    def _take_ahead(self, view: memoryview) -> int:
        count = min(len(view), len(self._ahead))
        if count:
            view[:count] = self._ahead[:count]
            self._ahead = self._ahead[count:]
        return count

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[None]:
        if self._shut:
            raise PeerError(Reason.CLOSED, "the stream was closed")
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._shut and not self._users:
            self._sock.close()


class _Waiting:
    """Waits for a socket to be ready, until a deadline."""

    def __init__(self, sock: socket.socket, events: int, timeout_s: float, late: str) -> None:
        self._poll = select.poll()
        self._poll.register(sock, events)
        self._deadline = time.monotonic() + timeout_s
        self._late = late

    def wait(self) -> None:
        left_s = self._deadline - time.monotonic()
        if left_s <= 0 or not self._poll.poll(left_s * 1000):
            raise PeerError(Reason.TIMEOUT, self._late)


def _not_ended(count: int) -> int:
    if count == 0:
        raise PeerError(Reason.TRUNCATED, "the stream ended without a final frame")
    return count


@contextlib.contextmanager
def _errors(doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise PeerError(Reason.CLOSED, f"the stream broke while {doing}") from e
