"""A payload of megabytes through a sealed session: one worker per direction, one frame at a time.

    sender    for each 256 KiB: hash, seal into one reused buffer, send;  then a frame: the digest
    receiver  for each frame: receive into one reused buffer, open into its place, hash

No lock, queue or await between: the kernel's socket buffers let the two ends run side by side, and
bound what is in flight. Memory: one frame at each end, beside the payload itself.
"""

from __future__ import annotations

import hashlib
import mmap
from typing import Final

from xpeer.errors import PeerError, Reason
from xpeer.network.stream import Stream
from xpeer.wire.frames import (
    FRAME_BYTES,
    FRAME_OVERHEAD,
    HEADER,
    MAX_SEALED_BYTES,
    TAG_BYTES,
    Kind,
    Opener,
    Sealer,
    parse_header,
)

DIGEST_BYTES: Final = 32


def sealed_size(num_bytes: int) -> int:
    """Bytes on the stream for a payload of this size, digest included."""
    num_frames = -(-num_bytes // FRAME_BYTES) + 1
    return num_bytes + DIGEST_BYTES + num_frames * FRAME_OVERHEAD


def send(stream: Stream, sealer: Sealer, payload: memoryview, frame_timeout_s: float) -> bytes:
    """Seal and send; in a worker thread.

    Args:
        stream: nobody else writes to it.
        sealer: of its session.
        payload: (num_bytes,) uint8, does not change meanwhile.
        frame_timeout_s: for the partner's side to take one frame.

    Returns:
        BLAKE2b-256 of the payload, as `identity.blake2b` makes it.

    Raises:
        PeerError: the stream broke or stalled.
    """
    digest = _digest(len(payload))
    frame = memoryview(bytearray(MAX_SEALED_BYTES))
    for start in range(0, len(payload), FRAME_BYTES):
        part = payload[start : start + FRAME_BYTES]
        digest.update(part)
        stream.send(frame[: sealer.seal_into(Kind.BULK, part, frame)], frame_timeout_s)
    stream.send(memoryview(sealer.seal(Kind.BULK, digest.digest())), frame_timeout_s)
    return digest.digest()


def receive(stream: Stream, opener: Opener, out: memoryview, frame_timeout_s: float) -> bytes:
    """Receive and open a payload of exactly the buffer's size; in a worker thread.

    Args:
        stream: nobody else reads from it.
        opener: of its session.
        out: (num_bytes,) uint8, writable; what is in it after an error is nobody's payload.
        frame_timeout_s: for one frame to arrive.

    Returns:
        BLAKE2b-256 of the payload.

    Raises:
        PeerError: more (OVERSIZE), less (MALFORMED) or other bytes (DIGEST_MISMATCH) than
            announced; the stream ended, broke or stalled.
    """
    digest = _digest(len(out))
    header = memoryview(bytearray(HEADER.size))
    sealed = memoryview(bytearray(MAX_SEALED_BYTES))
    for start in range(0, len(out), FRAME_BYTES):
        part = out[start : start + FRAME_BYTES]
        _receive_frame(stream, opener, header, sealed, part, frame_timeout_s)
        digest.update(part)
    claimed = memoryview(bytearray(DIGEST_BYTES))
    _receive_frame(stream, opener, header, sealed, claimed, frame_timeout_s)
    if claimed != digest.digest():
        raise PeerError(Reason.DIGEST_MISMATCH, "the payload is not what its sender hashed")
    return digest.digest()


def allocate(num_bytes: int) -> memoryview:
    """Zeros, writable, that take memory only where something was written; freed with the view."""
    if num_bytes == 0:
        return memoryview(bytearray())
    return memoryview(mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def _receive_frame(
    stream: Stream,
    opener: Opener,
    header: memoryview,
    sealed: memoryview,
    out: memoryview,
    timeout_s: float,
) -> None:
    """The next frame, which has to be of bulk and fill `out`."""
    stream.fill(header, timeout_s)
    kind, size = parse_header(bytes(header))
    body = sealed[:size]
    stream.fill(body, timeout_s)
    if kind is not Kind.BULK or size != len(out) + TAG_BYTES:
        opener.open(bytes(header), body)  # whose fault it is: a frame that does not open is no word
        if kind is Kind.END:
            raise PeerError(Reason.CLOSED, "the partner ended the session")
        if kind is not Kind.BULK:
            raise PeerError(Reason.MALFORMED, "bulk and messages out of order")
        reason = Reason.OVERSIZE if size > len(out) + TAG_BYTES else Reason.MALFORMED
        raise PeerError(reason, f"frame of {size - TAG_BYTES} bytes where {len(out)} were due")
    opener.open_into(bytes(header), body, out)


def _digest(num_bytes: int) -> hashlib.blake2b:
    """`identity.blake2b` of one part of this size, to be fed in pieces."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    digest.update(num_bytes.to_bytes(8, "little"))
    return digest
