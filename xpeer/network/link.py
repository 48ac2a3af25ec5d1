"""A sealed, bounded, ordered channel to one member over a raw libp2p stream.

Wire: HELLO each way, a secretstream header each way, then frames; each is preceded by its length
in four bytes, checked before a byte of it is read. libp2p ends a stream silently when either
process dies, so an end without the session's final frame is a truncation, never an end.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TypeVar

from xpeer.errors import PeerError, Reason, known_reason
from xpeer.identity import PeerId, blake2b
from xpeer.wire import messages
from xpeer.wire.messages import AnyMessage
from xpeer.wire.session import (
    FRAME_BYTES,
    HEADER_BYTES,
    MAX_HELLO_BYTES,
    MAX_SEALED_BYTES,
    Handshake,
    Session,
)

FRAME_TIMEOUT_S = 15.0
"""libp2p notices a silent partner after 40 s; we do after this."""
_MESSAGE, _BULK = b"\x00", b"\x01"
_CHUNK = FRAME_BYTES - 1
_M = TypeVar("_M", bound=messages.Message)


@dataclass
class Meter:
    """Bytes of this node over all links and calls."""

    bytes_in: int = 0
    bytes_out: int = 0


class Link:
    """One open session with one partner. Make with `connect`; one user at a time.

    Args:
        peer_id: the partner, authenticated by libp2p.
        reader: of the raw stream.
        writer: of the raw stream.
        frame_timeout_s: for one frame to arrive or to be taken.
        meter: counts sealed bytes, framing included.
    """

    def __init__(
        self,
        peer_id: PeerId,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        frame_timeout_s: float = FRAME_TIMEOUT_S,
        meter: Meter | None = None,
    ) -> None:
        self.peer_id = peer_id
        self._meter = meter or Meter()
        self.closed = False
        self._reader = reader
        self._writer = writer
        self._frame_timeout_s = frame_timeout_s
        self._session: Session | None = None

    async def connect(self, handshake: Handshake, *, initiator: bool) -> None:
        """Exchange HELLOs and session headers.

        Raises:
            PeerError: see `Handshake.receive`; or the stream ended or stalled.
        """
        if initiator:
            await self._write(handshake.hello())
            handshake.receive(await self._read(MAX_HELLO_BYTES))
        else:
            handshake.receive(await self._read(MAX_HELLO_BYTES))
            await self._write(handshake.hello())
        session = handshake.session()
        await self._write(session.header())
        session.start(await self._read(HEADER_BYTES))
        self._session = session

    async def send(self, message: AnyMessage) -> None:
        """Seal and send one message."""
        await self._write(self._open_session().seal(_MESSAGE + messages.encode(message)))

    async def receive(self, timeout_s: float | None = None) -> AnyMessage:
        """The partner's next message.

        Args:
            timeout_s: None = the usual time per frame.
        """
        return messages.decode(await self._next(_MESSAGE, timeout_s))

    async def expect(self, kind: type[_M], exchange_id: int, timeout_s: float | None = None) -> _M:
        """The partner's next message, which has to be this one.

        Raises:
            PeerError: it refused (with its reason), sent something else, or another exchange's.
        """
        message = await self.receive(timeout_s)
        if getattr(message, "exchange_id", None) != exchange_id:
            raise PeerError(Reason.MALFORMED, f"{type(message).__name__} of another exchange")
        if isinstance(message, messages.Refuse):
            raise RefusedError(known_reason(message.reason))
        if not isinstance(message, kind):
            raise PeerError(
                Reason.MALFORMED, f"{type(message).__name__} instead of {kind.__name__}"
            )
        return message

    async def send_bulk(self, payload: bytes | memoryview) -> None:
        """Seal and send a payload whose size a message announced; the loop stays responsive."""
        session, view = self._open_session(), memoryview(payload)
        for start in range(0, len(view), _CHUNK):
            await self._write(session.seal(_BULK + bytes(view[start : start + _CHUNK])))

    async def receive_bulk(self, num_bytes: int, digest: bytes) -> bytes:
        """Receive exactly the announced payload.

        Args:
            num_bytes: checked by the caller against what the manifest allows.
            digest: BLAKE2b-256 that the payload must have.

        Raises:
            PeerError: more, less, or other bytes than announced; ended or stalled.
        """
        payload = bytearray()
        while len(payload) < num_bytes:
            payload += await self._next(_BULK, None)
            if len(payload) > num_bytes:
                raise PeerError(Reason.OVERSIZE, f"more than the announced {num_bytes} bytes")
        data = bytes(payload)
        if blake2b(data) != digest:
            raise PeerError(Reason.DIGEST_MISMATCH, "payload has another digest than announced")
        return data

    async def close(self) -> None:
        """Say goodbye with the final frame, if the stream still takes it, and close."""
        if not self.closed and self._session is not None:
            self.closed = True
            with contextlib.suppress(PeerError, OSError, TimeoutError):
                await self._write(self._session.seal(_MESSAGE, final=True))
                self._writer.close()
                async with asyncio.timeout(self._frame_timeout_s):
                    await self._writer.wait_closed()
        self.abort()

    def abort(self) -> None:
        """Drop the stream at once, with what the partner did not read; it sees a truncation."""
        self.closed = True
        self._writer.transport.abort()

    def _open_session(self) -> Session:
        if self._session is None:
            raise RuntimeError("the link is not connected")
        if self.closed:
            raise PeerError(Reason.CLOSED, "the link was closed")
        return self._session

    async def _next(self, kind: bytes, timeout_s: float | None) -> bytes:
        session = self._open_session()
        frame = session.open(await self._read(MAX_SEALED_BYTES, timeout_s))
        if session.ended:
            raise PeerError(Reason.CLOSED, "the partner ended the session")
        if frame[:1] != kind:
            raise PeerError(Reason.MALFORMED, "bulk and messages out of order")
        return frame[1:]

    async def _write(self, data: bytes) -> None:
        self._writer.write(len(data).to_bytes(4, "big") + data)
        self._meter.bytes_out += 4 + len(data)
        try:
            async with asyncio.timeout(self._frame_timeout_s):
                await self._writer.drain()
        except TimeoutError as e:
            raise PeerError(Reason.TIMEOUT, "the partner does not read") from e
        except (ConnectionError, OSError) as e:
            raise PeerError(Reason.CLOSED, "the stream broke while sending") from e

    async def _read(self, limit: int, timeout_s: float | None = None) -> bytes:
        try:
            async with asyncio.timeout(timeout_s or self._frame_timeout_s):
                length = int.from_bytes(await self._reader.readexactly(4), "big")
                if length > limit:
                    raise PeerError(Reason.OVERSIZE, f"frame of {length} bytes, at most {limit}")
                data = await self._reader.readexactly(length)
        except TimeoutError as e:
            raise PeerError(Reason.TIMEOUT, "no frame in time") from e
        except asyncio.IncompleteReadError as e:
            raise PeerError(Reason.TRUNCATED, "the stream ended without a final frame") from e
        except (ConnectionError, OSError) as e:
            raise PeerError(Reason.CLOSED, "the stream broke while receiving") from e
        self._meter.bytes_in += 4 + length
        return data


class RefusedError(PeerError):
    """The partner refused, politely: the session stays usable."""
