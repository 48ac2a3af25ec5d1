"""A sealed, bounded, ordered channel to one member.

Wire: a HELLO each way, each preceded by its length in four bytes; then sealed frames
(`wire.frames`). A frame's header is checked before a byte more is read. The first frame offers a
direct stream, and bulk uses that stream if it opens and is faster. libp2p ends a stream silently
when either process dies, so an end without an END frame is a truncation, never an end.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

from xpeer.errors import PeerError, Reason, known_reason
from xpeer.identity import PeerId
from xpeer.network import bulk
from xpeer.network.direct import NO_OFFER, Direct, Offer, Paths
from xpeer.network.rates import Pace
from xpeer.network.stream import Stream
from xpeer.wire import messages
from xpeer.wire.frames import FRAME_BYTES, HEADER, Kind, parse_header
from xpeer.wire.messages import AnyMessage
from xpeer.wire.session import MAX_HELLO_BYTES, Handshake, Session

FRAME_TIMEOUT_S = 15.0
"""libp2p notices a silent partner after 40 s; we do after this."""
ENDS_IN_S, ENDS_IN_FRAMES = 1.0, 64
"""Time and frames that a partner still has after we refused it in mid-exchange."""
_LENGTH_BYTES = 4
_M = TypeVar("_M", bound=messages.Message)


@dataclass
class Meter:
    """Counts this node's bytes over all links and calls. Bulk is counted once it ends."""

    bytes_in: int = 0
    bytes_out: int = 0


class Link:
    """One open session with one partner. It is usable after `connect`.

    It has one user at a time, who may send and receive at the same time.

    Args:
        peer_id: the partner, authenticated by libp2p.
        stream: the raw stream.
        frame_timeout_s: for one frame to arrive, or for the partner to read one.
        meter: counts sealed bytes, framing included.
        direct: opens direct streams; None = the link offers none.

    Attributes:
        closed: True iff this end closed or aborted the link.
    """

    def __init__(
        self,
        peer_id: PeerId,
        stream: Stream,
        frame_timeout_s: float = FRAME_TIMEOUT_S,
        meter: Meter | None = None,
        direct: Direct | None = None,
    ) -> None:
        self.peer_id = peer_id
        self.closed = False
        self._stream = stream
        self._frame_timeout_s = frame_timeout_s
        self._meter = meter or Meter()
        self._session: Session | None = None
        self._direct = direct
        self._second: asyncio.Task[tuple[Stream, Session] | None] | None = None
        self._may_be_direct = False
        """True iff one of the two ends offered to be connected to directly."""
        self._paths = Paths()

    async def connect(self, handshake: Handshake, *, initiator: bool) -> None:
        """Exchange HELLOs, derive the keys, and begin to open a direct stream.

        Raises:
            PeerError: see `Handshake.receive`; or the stream ended or stalled.
        """
        if initiator:
            await self._write_hello(handshake)
            handshake.receive(await self._read_hello())
        else:
            handshake.receive(await self._read_hello())
            await self._write_hello(handshake)
        self._session = session = handshake.session()
        ours = self._direct.offer(self.peer_id) if self._direct is not None else NO_OFFER
        await self._write(session.sealer.seal(Kind.MESSAGE, ours.to_bytes()))
        theirs = Offer.from_bytes(await self._next())
        self._may_be_direct = bool(ours.port or theirs.port)
        if self._direct is not None:
            self._second = asyncio.create_task(
                self._direct.open(self.peer_id, session, ours, theirs, initiator=initiator)
            )

    async def send(self, message: AnyMessage) -> None:
        """Seal and send one message."""
        sealer = self._open_session().sealer
        await self._write(sealer.seal(Kind.MESSAGE, messages.encode(message)))

    async def receive(self, timeout_s: float | None = None) -> AnyMessage:
        """The partner's next message.

        Args:
            timeout_s: for the message to begin; None = the usual time per frame.
        """
        return messages.decode(await self._next(timeout_s))

    async def expect(self, kind: type[_M], exchange_id: int, timeout_s: float | None = None) -> _M:
        """The partner's next message, which has to be of this kind and exchange.

        Raises:
            RefusedError: the partner refused; it has the partner's reason.
            PeerError: the message is of another kind or another exchange.
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

    async def send_bulk(self, payload: bytes | memoryview, pace: Pace | None = None) -> bytes:
        """Seal and send a payload whose size a message announced, off the event loop.

        Returns:
            The digest that `receive_bulk` has to return at the other end.

        Raises:
            PeerError: the stream broke or stalled.
        """
        session, view, stream = self._open_session(), memoryview(payload), self._stream
        second = self._second_if_open()
        direct = second is not None and self._paths.choose(len(view))
        started = time.monotonic()
        with self._fails_whole(direct):
            if direct and second is not None:
                await self._write(session.sealer.seal(Kind.ELSEWHERE, b""))
                stream, session = second
            digest = await stream.in_thread(
                lambda: bulk.send(stream, session.sealer, view, self._frame_timeout_s, pace)
            )
        self._paths.took(direct, len(view), time.monotonic() - started)
        self._meter.bytes_out += bulk.sealed_size(len(view))
        return digest

    async def receive_bulk(self, num_bytes: int) -> tuple[memoryview, bytes]:
        """Receive exactly the announced payload, off the event loop.

        Args:
            num_bytes: the caller has checked it against what the manifest allows.

        Returns:
            The payload, writable, and a digest of its frames.

        Raises:
            PeerError: the payload is longer or shorter than announced, or was altered; or the
                stream ended or stalled.
        """
        payload = bulk.allocate(num_bytes)
        return payload, await self.receive_into(payload)

    async def receive_into(self, payload: memoryview, pace: Pace | None = None) -> bytes:
        """Receive the announced payload into the caller's memory, and return its digest.

        Args:
            payload: (num_bytes,) uint8, writable.
            pace: bounds the time of the whole transfer; None = no bound.
        """
        session, stream = self._open_session(), self._stream
        direct = False
        with self._fails_whole(direct=False):
            header = await self._read(HEADER.size)
            kind, size = parse_header(header)
            if kind is Kind.ELSEWHERE:
                session.opener.open(header, await self._read(size))
                stream, session = await self._second_stream()
                direct = True
            else:
                stream.unread(header)
        with self._fails_whole(direct):
            digest = await stream.in_thread(
                lambda: bulk.receive(stream, session.opener, payload, self._frame_timeout_s, pace)
            )
        already = 0 if direct else HEADER.size
        self._meter.bytes_in += bulk.sealed_size(len(payload)) - already
        return digest

    async def close(self) -> None:
        """Send the END frame, if the stream still works, and close."""
        if not self.closed and self._session is not None:
            self.closed = True
            with contextlib.suppress(PeerError):
                await self._write(self._session.sealer.seal(Kind.END, b""))
        self.abort()

    async def ended(self) -> None:
        """Wait, after a refusal in mid-exchange, until the partner has read it and drops the link.

        What it still sends is thrown away. If we closed at once, the refusal might be lost.
        """
        with contextlib.suppress(PeerError, TimeoutError):
            async with asyncio.timeout(ENDS_IN_S):
                for _ in range(ENDS_IN_FRAMES):
                    self._meter.bytes_in += len(await self._stream.read(FRAME_BYTES))

    def abort(self) -> None:
        """Drop the streams at once; the partner sees a truncation."""
        self.closed = True
        self._stream.shutdown()
        if self._second is not None:
            self._second.cancel()
            if (second := self._second_if_open()) is not None:
                second[0].shutdown()

    @property
    def partner_ended(self) -> bool:
        """Whether the partner ended the session: its link did not break."""
        return self._session is not None and self._session.opener.ended

    def _open_session(self) -> Session:
        if self._session is None:
            raise RuntimeError("the link is not connected")
        if self.closed:
            raise PeerError(Reason.CLOSED, "the link was closed")
        return self._session

    def _second_if_open(self) -> tuple[Stream, Session] | None:
        task = self._second
        return task.result() if task is not None and task.done() and not task.cancelled() else None

    async def _second_stream(self) -> tuple[Stream, Session]:
        """Wait for the direct stream. The partner uses it already; our end may lag a little."""
        second = await self._second if self._second is not None else None
        if second is None and self._direct is not None and self._may_be_direct:
            self._direct.broke(self.peer_id)  # it opened at the other end alone: no fault of theirs
            raise PeerError(Reason.CLOSED, "the direct stream did not open at this end")
        if second is None:
            raise PeerError(Reason.MALFORMED, "bulk on a direct stream that is not there")
        return second

    @contextlib.contextmanager
    def _fails_whole(self, direct: bool) -> Iterator[None]:
        """Abort the link if the transfer fails: the stream is then in the middle of a frame."""
        try:
            yield
        except BaseException as e:
            if direct and self._direct is not None and isinstance(e, PeerError):
                self._direct.broke(self.peer_id)
            self.abort()
            raise

    async def _next(self, timeout_s: float | None = None) -> bytes:
        opener = self._open_session().opener
        header = await self._read(HEADER.size, timeout_s)
        kind, size = parse_header(header)
        plaintext = opener.open(header, await self._read(size))
        if opener.ended:
            raise PeerError(Reason.CLOSED, "the partner ended the session")
        if kind is not Kind.MESSAGE:
            raise PeerError(Reason.MALFORMED, "bulk and messages out of order")
        return plaintext

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
    """The partner refused with a message. The session stays usable."""
