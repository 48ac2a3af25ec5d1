"""A payload of megabytes through a sealed session: one worker per direction, one frame at a time.

    sender    for each 256 KiB: seal into one reused buffer, send
    receiver  for each frame: receive into one reused buffer, open into its place

No lock, queue or await between: the kernel's socket buffers let the two ends run side by side, and
bound what is in flight. Memory: one frame at each end, beside the payload itself.

Both ends hash the frames' tags, and the receiver's acceptance names that hash: that both moved the
same frames in the same order. The frames themselves are authenticated; hashing the payload, too,
would cost more than everything else here together (docs/decisions.md).
"""

from __future__ import annotations

import hashlib
import mmap
import time
from typing import Final

from xpeer.errors import PeerError, Reason
from xpeer.network.rates import Pace
from xpeer.network.stream import Stream
from xpeer.wire.aead import TAG_BYTES
from xpeer.wire.frames import (
    FRAME_BYTES,
    FRAME_OVERHEAD,
    HEADER,
    MAX_SEALED_BYTES,
    Kind,
    Opener,
    Sealer,
    parse_header,
)

DIGEST_BYTES: Final = 32
SPARE_PAYLOADS: Final = 2
_spare: list[memoryview] = []


def sealed_size(num_bytes: int) -> int:
    """Bytes on the stream for a payload of this size."""
    return num_bytes + len(_starts(num_bytes)) * FRAME_OVERHEAD


def send(
    stream: Stream,
    sealer: Sealer,
    payload: memoryview,
    frame_timeout_s: float,
    pace: Pace | None = None,
) -> bytes:
    """Seal and send; in a worker thread.

    Args:
        stream: nobody else writes to it.
        sealer: of its session.
        payload: (num_bytes,) uint8, does not change meanwhile.
        frame_timeout_s: for the partner's side to take one frame.
        pace: bounds the time of the whole transfer; None = no bound.

    Returns:
        BLAKE2b-256 of the frames' tags.

    Raises:
        PeerError: the stream broke or stalled.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    frame = memoryview(bytearray(MAX_SEALED_BYTES))
    for start in _starts(len(payload)):
        part = payload[start : start + FRAME_BYTES]
        size = sealer.seal_into(Kind.BULK, part, frame)
        digest.update(frame[size - TAG_BYTES : size])
        stream.send(frame[:size], _allowed_s(pace, len(part), frame_timeout_s))
        if pace is not None:
            pace.moved += len(part)
    return digest.digest()


def receive(
    stream: Stream,
    opener: Opener,
    out: memoryview,
    frame_timeout_s: float,
    pace: Pace | None = None,
) -> bytes:
    """Receive and open a payload of exactly the buffer's size; in a worker thread.

    Args:
        stream: nobody else reads from it.
        opener: of its session.
        out: (num_bytes,) uint8, writable.
        frame_timeout_s: for one frame to arrive.
        pace: bounds the time of the whole transfer, and counts whole frames; None = no bound.

    Returns:
        BLAKE2b-256 of the frames' tags.

    Raises:
        PeerError: more (OVERSIZE) or less (MALFORMED) than announced, frames that do not open
            (TAMPERED); the stream ended, broke or stalled.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    header = memoryview(bytearray(HEADER.size))
    sealed = memoryview(bytearray(MAX_SEALED_BYTES))
    for start in _starts(len(out)):
        part = out[start : start + FRAME_BYTES]
        timeout_s = _allowed_s(pace, len(part), frame_timeout_s)
        digest.update(_receive_frame(stream, opener, header, sealed, part, timeout_s))
        if pace is not None:
            pace.moved += len(part)
    return digest.digest()


def allocate(num_bytes: int) -> memoryview:
    """Writable memory of any content; freed with the view, unless `release` gets it.

    The kernel gives a page only when it is written, so a mere announcement costs nothing.
    """
    for number, spare in enumerate(_spare):
        if len(spare) == num_bytes:
            return _spare.pop(number)
    if num_bytes == 0:
        return memoryview(bytearray())
    return memoryview(mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def release(payload: memoryview) -> None:
    """Keep a payload's memory for the next payload of its size; nobody may refer to it any more.

    Fresh pages cost as much as opening the frames that fill them. Call it on the event loop, as
    `allocate`.
    """
    _spare.append(payload)
    del _spare[:-SPARE_PAYLOADS]


def _starts(num_bytes: int) -> range:
    """Where each frame's part of the payload starts; an empty payload is one empty frame."""
    return range(0, max(num_bytes, 1), FRAME_BYTES)


def _allowed_s(pace: Pace | None, num_bytes: int, frame_timeout_s: float) -> float:
    return frame_timeout_s if pace is None else min(frame_timeout_s, pace.allows_s(num_bytes))


def _receive_frame(
    stream: Stream,
    opener: Opener,
    header: memoryview,
    sealed: memoryview,
    out: memoryview,
    timeout_s: float,
) -> memoryview:
    """Open the next frame into `out`, which it has to fill, and return its tag."""
    until = time.monotonic() + timeout_s
    stream.fill(header, timeout_s)
    kind, size = parse_header(bytes(header))
    body = sealed[:size]
    stream.fill(body, until - time.monotonic())
    if kind is not Kind.BULK or size != len(out) + TAG_BYTES:
        # Authenticate first: a forged frame has to raise TAMPERED, whatever else is wrong with it.
        opener.open(bytes(header), body)
        if kind is Kind.END:
            raise PeerError(Reason.CLOSED, "the partner ended the session")
        if kind is not Kind.BULK:
            raise PeerError(Reason.MALFORMED, "bulk and messages out of order")
        reason = Reason.OVERSIZE if size > len(out) + TAG_BYTES else Reason.MALFORMED
        raise PeerError(reason, f"frame of {size - TAG_BYTES} bytes where {len(out)} were due")
    opener.open_into(bytes(header), body, out)
    return body[-TAG_BYTES:]
