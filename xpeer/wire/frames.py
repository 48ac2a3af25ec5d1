"""Sealed frames: one AEAD call per frame, a counter as nonce; no IO, no copies of its own.

    header = length (4 bytes, of all that follows it) || kind (1 byte)
    frame  = header || AEAD(key, nonce = counter, associated data = header, plaintext) || tag

The receiver counts too, so a frame that was altered, replayed, reordered, dropped or moved to the
other direction fails to open; END is the only proper end (Hoang et al. 2015, "Online authenticated
encryption and its nonce-reuse misuse-resistance", section 7: STREAM, with the kind in the
associated data in place of the final flag in the nonce). A key seals one direction of one session.

What it does not give: hiding lengths and kinds of frames.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

from xpeer.errors import PeerError, Reason
from xpeer.wire.aead import NONCE_BYTES, TAG_BYTES, Aead, Buffer, Cipher, ForgedError

FRAME_BYTES: Final = 256 << 10
"""Plaintext of a frame, at most."""
HEADER: Final = struct.Struct(">IB")
FRAME_OVERHEAD: Final = HEADER.size + TAG_BYTES
MAX_SEALED_BYTES: Final = FRAME_BYTES + FRAME_OVERHEAD
"""A whole frame, at most."""
MAX_FRAMES: Final = 1 << 32
"""Per key: with 2**14 blocks a frame, an observer's advantage stays below 2**-36 (McGrew and Viega
2004, theorem 1). At 1 GB/s that is 13 days; a new session has new keys."""


class Kind(IntEnum):
    """What a frame holds."""

    MESSAGE = 0
    BULK = 1
    END = 2
    ELSEWHERE = 3
    """The bulk that is due follows on the direct stream; empty."""


class Sealer:
    """Seals our frames, in order.

    Args:
        key: 32 bytes, for this direction of this session alone.
        cipher: agreed in the handshake.
    """

    def __init__(self, key: bytes, cipher: Cipher) -> None:
        self._aead = Aead(cipher, key)
        self._count = 0

    def seal(self, kind: Kind, plaintext: Buffer) -> bytes:
        """One frame, header included."""
        out = bytearray(len(plaintext) + FRAME_OVERHEAD)
        self.seal_into(kind, plaintext, memoryview(out))
        return bytes(out)

    def seal_into(self, kind: Kind, plaintext: Buffer, out: memoryview) -> int:
        """`seal` into the front of a writable buffer; the number of bytes written.

        Raises:
            ValueError: more than FRAME_BYTES.
            PeerError: the key is used up (CLOSED).
        """
        size = len(plaintext)
        if size > FRAME_BYTES:
            raise ValueError(f"frame of {size} bytes, at most {FRAME_BYTES}")
        end = size + FRAME_OVERHEAD
        HEADER.pack_into(out, 0, size + TAG_BYTES, kind)
        header = bytes(out[: HEADER.size])
        self._aead.seal_into(_nonce(self._count), plaintext, header, out[HEADER.size : end])
        self._count += 1
        return end


class Opener:
    """Opens the partner's frames, in order.

    Args:
        key: 32 bytes, the partner's.
        cipher: agreed in the handshake.
    """

    def __init__(self, key: bytes, cipher: Cipher) -> None:
        self._aead = Aead(cipher, key)
        self._count = 0
        self.ended = False
        """The partner's END was opened: an end of the stream now is a proper one."""

    def open(self, header: bytes, sealed: Buffer) -> bytes:
        """What follows a header, opened."""
        out = bytearray(max(len(sealed) - TAG_BYTES, 0))
        self.open_into(header, sealed, out)
        return bytes(out)

    def open_into(self, header: bytes, sealed: Buffer, out: bytearray | memoryview) -> None:
        """`open` into a writable buffer of exactly the plaintext's size.

        Raises:
            PeerError: altered, replayed, reordered, made without the swarm key, or after the end
                (TAMPERED); the key is used up (CLOSED).
        """
        if self.ended:
            raise PeerError(Reason.TAMPERED, "frame after the session's end")
        try:
            self._aead.open_into(_nonce(self._count), sealed, header, out)
        except ForgedError as e:
            raise PeerError(Reason.TAMPERED, "a frame does not open") from e
        self._count += 1
        self.ended = header[-1] == Kind.END


def parse_header(header: bytes) -> tuple[Kind, int]:
    """Kind of a frame, and how many sealed bytes follow; checked before one of them is read.

    Raises:
        PeerError: longer than a frame may be (OVERSIZE), shorter, or of no known kind (MALFORMED).
    """
    size, kind = HEADER.unpack(header)
    if size > FRAME_BYTES + TAG_BYTES:
        raise PeerError(Reason.OVERSIZE, f"frame of {size} bytes, at most {MAX_SEALED_BYTES}")
    if size < TAG_BYTES or kind > Kind.ELSEWHERE:
        raise PeerError(Reason.MALFORMED, f"frame of kind {kind} and {size} bytes")
    return Kind(kind), size


def _nonce(count: int) -> bytes:
    if count >= MAX_FRAMES:
        raise PeerError(Reason.CLOSED, "the session's keys are used up; a new one has new keys")
    return count.to_bytes(NONCE_BYTES, "big")
