"""Two hosts, as network namespaces, and the long wire between them: a rate and a delay each way.

Each host has a TUN device; a thread here takes the packets that one host sends and gives them to
the other when their time has come. Kernels without netem have no other way to delay packets.
Segmentation is left to the receiver (as network cards do): TCP sees an MTU of 1500 and its own
segments, while up to 64 KB of them cross this thread at once, so that it needs little of a core.
Needs root, iproute2 and /dev/net/tun. Everything that is made is removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator

_PREFIX = f"xo{os.getpid() % 10_000}"
_TUN_SET_INTERFACE, _TUN_SET_OFFLOAD = 0x400454CA, 0x400454D0
_TUN, _NO_PACKET_INFO, _VNET_HEADER = 0x0001, 0x1000, 0x4000
_CHECKSUM, _TCP4, _TCP6 = 1, 2, 4
_HEADER = struct.Struct("=BBHHHH")
"""virtio_net_hdr: flags, kind of segmentation, header bytes, segment bytes, checksum's place."""
_MAX_PACKET = 65_536 + _HEADER.size
_QUEUE_S = 0.1
"""What the wire's sender may hold before it drops: a round trip of the wire's usual delay."""


class Direction:
    """One way of the wire: a queue that empties at a rate, then a delay.

    Args:
        mbit_per_s: infinite = no queue.
        delay_s: after the queue.
    """

    def __init__(self, mbit_per_s: float, delay_s: float) -> None:
        self.mbit_per_s, self.delay_s = mbit_per_s, delay_s
        self.num_bytes = self.dropped = 0
        self._free_at = 0.0
        self._due: deque[tuple[float, bytes]] = deque()

    def take(self, packet: bytes, num_bytes: int, now_s: float) -> None:
        """A packet is sent.

        Args:
            packet: as it is to be delivered.
            num_bytes: that it occupies the wire with.
            now_s: of a monotonic clock.
        """
        begins = max(now_s, self._free_at)
        if begins - now_s > _QUEUE_S:
            self.dropped += 1
            return
        self._free_at = begins + num_bytes * 8e-6 / self.mbit_per_s
        self.num_bytes += num_bytes
        self._due.append((self._free_at + self.delay_s, packet))

    def arrived(self, now_s: float) -> Iterator[bytes]:
        """Packets whose time has come, in the order in which they were sent."""
        while self._due and self._due[0][0] <= now_s:
            yield self._due.popleft()[1]

    @property
    def next_s(self) -> float:
        """When the next packet arrives; infinite if none is under way."""
        return self._due[0][0] if self._due else float("inf")


class Wire:
    """The namespaces `hosts` at `addresses`, and the thread between them.

    Attributes:
        seconds: of a core that the thread has used.
    """

    def __init__(self, hosts: list[str], addresses: list[str], tuns: list[int]) -> None:
        self.hosts, self.addresses = hosts, addresses
        self.seconds = 0.0
        self._tuns = tuns
        self._ways = {tun: Direction(float("inf"), 0.0) for tun in tuns}
        self._stopped = False
        self._thread = threading.Thread(target=self._carry, name="wire", daemon=True)
        self._thread.start()

    def shape(self, mbit_per_s: float, delay_s: float) -> None:
        """From now on, each way; what is under way arrives before what is sent later."""
        for way in self._ways.values():
            way.mbit_per_s, way.delay_s = mbit_per_s, delay_s

    def carried(self) -> dict[str, float]:
        """So far: bytes from the first host and from the second, and what was dropped."""
        one, other = (self._ways[tun] for tun in self._tuns)
        return {
            "bytes_0": one.num_bytes,
            "bytes_1": other.num_bytes,
            "dropped": one.dropped + other.dropped,
            "seconds": self.seconds,
        }

    def stop(self) -> None:
        """End the thread."""
        self._stopped = True
        self._thread.join()

    def _carry(self) -> None:
        there = dict(zip(self._tuns, reversed(self._tuns), strict=True))
        poller = select.epoll()
        for tun in self._tuns:
            poller.register(tun, select.EPOLLIN)
        while not self._stopped:
            wait_s = min(way.next_s for way in self._ways.values()) - time.monotonic()
            for tun, _ in poller.poll(min(max(wait_s, 0.0), 0.1)):
                self._read(tun)
            now_s = time.monotonic()
            for tun, way in self._ways.items():
                for packet in way.arrived(now_s):
                    _write(there[tun], packet)
            self.seconds = time.thread_time()
        poller.close()

    def _read(self, tun: int) -> None:
        way, now_s = self._ways[tun], time.monotonic()
        with contextlib.suppress(BlockingIOError):
            while packet := os.read(tun, _MAX_PACKET):
                way.take(packet, on_the_wire(packet), now_s)


def on_the_wire(packet: bytes) -> int:
    """Bytes of all segments that a packet will be cut into, each with headers of its own."""
    _, kind, header, segment, _, _ = _HEADER.unpack_from(packet)
    num_bytes = len(packet) - _HEADER.size
    if kind == 0 or segment == 0:
        return num_bytes
    segments = -(-(num_bytes - header) // segment)
    return int(num_bytes + (segments - 1) * header)


@contextlib.contextmanager
def laid() -> Iterator[Wire]:
    """Two hosts and a wire without rate or delay; gone when the block ends.

    Raises:
        OSError, subprocess.CalledProcessError: this user or kernel can't.
    """
    names, addresses = [f"{_PREFIX}h{i}" for i in range(2)], [f"10.98.0.{i + 1}" for i in range(2)]
    made: list[str] = []
    tuns: list[int] = []
    wire: Wire | None = None
    try:
        for name, address in zip(names, addresses, strict=True):
            _ip("netns", "add", name)
            made.append(name)
            tuns.append(_tun(name))
            _ip("link", "set", name, "netns", name)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
            _ip("-n", name, "link", "set", name, "txqueuelen", "10000", "up")
        wire = Wire(names, addresses, tuns)
        yield wire
    finally:
        if wire is not None:
            wire.stop()
        for tun in tuns:
            os.close(tun)
        for name in made:
            _ip("netns", "del", name)


def _tun(name: str) -> int:
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    try:
        flags = _TUN | _NO_PACKET_INFO | _VNET_HEADER
        fcntl.ioctl(tun, _TUN_SET_INTERFACE, struct.pack("16sH22x", name.encode(), flags))
        fcntl.ioctl(tun, _TUN_SET_OFFLOAD, _CHECKSUM | _TCP4 | _TCP6)
    except OSError:
        os.close(tun)
        raise
    return tun


def _write(tun: int, packet: bytes) -> None:
    try:
        os.write(tun, packet)
    except OSError as e:  # the host is going down, or its queue is full: packets get lost
        if e.errno not in (errno.EAGAIN, errno.EIO, errno.ENOBUFS):
            raise


def _ip(*arguments: str) -> None:
    command = ["ip", *arguments]
    subprocess.run(command, check=True, capture_output=True)
