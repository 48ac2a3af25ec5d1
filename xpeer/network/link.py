"""A sealed, bounded, ordered channel to one member.

Wire: a HELLO each way, each preceded by its length in four bytes; then sealed frames
(`wire.frames`), whose headers are checked before a byte more is read. libp2p ends a stream silently
when either process dies, so an end without an END frame is a truncation, never an end.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from xpeer.errors import PeerError, Reason, known_reason
from xpeer.identity import PeerId
from xpeer.network import bulk
from xpeer.network.stream import Stream
from xpeer.wire import messages
from xpeer.wire.frames import HEADER, Kind, parse_header
from xpeer.wire.messages import AnyMessage
from xpeer.wire.session import MAX_HELLO_BYTES, Handshake, Session

FRAME_TIMEOUT_S = 15.0
"""libp2p notices a silent partner after 40 s; we do after this."""
_LENGTH_BYTES = 4
_M = TypeVar("_M", bound=messages.Message)


@dataclass
class Meter:
    """Bytes of this node over all links and calls; bulk is counted when it ends."""

    bytes_in: int = 0
    bytes_out: int = 0


class Link:
    """One open session with one partner. Make with `connect`.

    One user at a time, who may send and receive at the same time.

    Args:
        peer_id: the partner, authenticated by libp2p.
        stream: raw.
        frame_timeout_s: for one frame to arrive or to be taken.
        meter: counts sealed bytes, framing included.
    """

    def __init__(
        self,
        peer_id: PeerId,
        stream: Stream,
        frame_timeout_s: float = FRAME_TIMEOUT_S,
        meter: Meter | None = None,
    ) -> None:
        self.peer_id = peer_id
        self.closed = False
        self._stream = stream
        self._frame_timeout_s = frame_timeout_s
        self._meter = meter or Meter()
        self._session: Session | None = None

    async def connect(self, handshake: Handshake, *, initiator: bool) -> None:
        """Exchange HELLOs and derive the keys.

        Raises:
            PeerError: see `Handshake.receive`; or the stream ended or stalled.
        """
        if initiator:
            await self._write_hello(handshake)
            handshake.receive(await self._read_hello())
        else:
            handshake.receive(await self._read_hello())
            await self._write_hello(handshake)
        self._session = handshake.session()

    async def send(self, message: AnyMessage) -> None:
        """Seal and send one message."""
        sealer = self._open_session().sealer
        await self._write(sealer.seal(Kind.MESSAGE, messages.encode(message)))

    async def receive(self, timeout_s: float | None = None) -> AnyMessage:
        """The partner's next message.

        Args:
            timeout_s: for it to begin; None = the usual time per frame.
        """
        opener = self._open_session().opener
        header = await self._read(HEADER.size, timeout_s)
        kind, size = parse_header(header)
        plaintext = opener.open(header, await self._read(size))
        if opener.ended:
            raise PeerError(Reason.CLOSED, "the partner ended the session")
        if kind is not Kind.MESSAGE:
            raise PeerError(Reason.MALFORMED, "bulk and messages out of order")
        return messages.decode(plaintext)

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

    async def send_bulk(self, payload: bytes | memoryview) -> bytes:
        """Seal and send a payload whose size a message announced, off the event loop.

        Returns:
            BLAKE2b-256 of the payload.

        Raises:
            PeerError: the stream broke or stalled.
        """
        sealer, view = self._open_session().sealer, memoryview(payload)
        digest = await self._stream.in_thread(
            lambda: bulk.send(self._stream, sealer, view, self._frame_timeout_s)
        )
        self._meter.bytes_out += bulk.sealed_size(len(view))
        return digest

    async def receive_bulk(self, num_bytes: int) -> tuple[memoryview, bytes]:
        """Receive exactly the announced payload, off the event loop.

        Args:
            num_bytes: checked by the caller against what the manifest allows.

        Returns:
            The payload, writable, and its BLAKE2b-256, which the sender stands by.

        Raises:
            PeerError: more, less, or other bytes than announced; ended or stalled.
        """
        opener, payload = self._open_session().opener, bulk.allocate(num_bytes)
        digest = await self._stream.in_thread(
            lambda: bulk.receive(self._stream, opener, payload, self._frame_timeout_s)
        )
        self._meter.bytes_in += bulk.sealed_size(num_bytes)
        return payload, digest

    async def close(self) -> None:
        """Say goodbye with the END frame, if the stream still takes it, and close."""
        if not self.closed and self._session is not None:
            self.closed = True
            with contextlib.suppress(PeerError):
                await self._write(self._session.sealer.seal(Kind.END, b""))
        self.abort()

    def abort(self) -> None:
        """Drop the stream at once; the partner sees a truncation."""
        self.closed = True
        self._stream.shutdown()

    def _open_session(self) -> Session:
        if self._session is None:
            raise RuntimeError("the link is not connected")
        if self.closed:
            raise PeerError(Reason.CLOSED, "the link was closed")
        return self._session

    async def _write_hello(self, handshake: Handshake) -> None:
        hello = handshake.hello()
        await self._write(len(hello).to_bytes(_LENGTH_BYTES, "big") + hello)

    async def _read_hello(self) -> bytes:
        length = int.from_bytes(await self._read(_LENGTH_BYTES), "big")
        if length > MAX_HELLO_BYTES:
            raise PeerError(Reason.OVERSIZE, f"HELLO of {length} bytes, at most {MAX_HELLO_BYTES}")
        return await self._read(length)

    async def _write(self, data: bytes) -> None:
        with _timeout_as("the partner does not read"):
            async with asyncio.timeout(self._frame_timeout_s):
                await self._stream.write(data)
        self._meter.bytes_out += len(data)

    async def _read(self, num_bytes: int, timeout_s: float | None = None) -> bytes:
        with _timeout_as("no frame in time"):
            async with asyncio.timeout(timeout_s or self._frame_timeout_s):
                data = await self._stream.read(num_bytes)
        self._meter.bytes_in += num_bytes
        return data


@contextlib.contextmanager
def _timeout_as(detail: str) -> Iterator[None]:
    try:
        yield
    except TimeoutError as e:
        raise PeerError(Reason.TIMEOUT, detail) from e


class RefusedError(PeerError):
    """The partner refused, politely: the session stays usable."""
