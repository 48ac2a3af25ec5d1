"""A second stream to a partner for bulk: plain TCP beside libp2p's stream.

It carries the same sealed frames with fewer copies. It needs one end that listens
(`network.direct_listen`) and can be reached by the other.

    in the sealed session, each way   OFFER{port, ticket}
    dialler -> listener               ticket, then an empty sealed frame
    listener -> dialler               an empty sealed frame

The frames' keys follow from the session's keys and the listener's ticket, so a stolen ticket opens
nothing. The dialler uses the address of its own sidecar's connection to this partner: no partner
can name hosts for us to dial. From a stranger who connects we read 16 bytes, within a few seconds,
and send nothing. There are few such sockets at a time.

What it does not give: it does not hide the lengths of frames (libp2p's Noise does not either), and
it finds no way through NATs.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from xpeer.errors import ConfigError, PeerError, Reason
from xpeer.identity import PeerId
from xpeer.leaves import Public, seen_by
from xpeer.network.addresses import resolve_listen
from xpeer.network.stream import Stream
from xpeer.wire.frames import HEADER, Kind, parse_header
from xpeer.wire.messages import unpack
from xpeer.wire.session import Session

log = logging.getLogger("xpeer.network")

TICKET_BYTES: Final = 16
OPEN_TIMEOUT_S: Final = 5.0
"""Time for each step: to connect, to present a ticket, to send the first frame."""
TICKET_S: Final = 2 * OPEN_TIMEOUT_S
"""A ticket is void if nobody presented it within this time."""
MAX_KNOCKING: Final = 32
"""Sockets at a time that have not presented a ticket yet. A further one is closed at once."""
MAX_HOSTS: Final = 4
AVOID_S: Final = 600.0
"""After a direct stream broke in use, its partner is served through libp2p for this long."""
MAX_AVOIDED: Final = 1024
MEASURED_BYTES: Final = 4 << 20
"""Smaller transfers say nothing about a stream's speed."""
TRY_OTHER_EVERY: Final = 32
"""Every so many transfers the slower stream is tried again."""

HostsOf = Callable[[PeerId], Awaitable[list[str]]]


@seen_by("partners")
class Offer(Struct, frozen=True, forbid_unknown_fields=True):
    """The first message each way in a session."""

    port: Public[Annotated[int, Meta(ge=0, le=65535)]]
    """TCP port at which the sender listens; 0 = it does not listen."""
    ticket: Public[Annotated[bytes, Meta(min_length=TICKET_BYTES, max_length=TICKET_BYTES)]]
    """Lets the receiver make one connection, within TICKET_S."""

    def to_bytes(self) -> bytes:
        """As msgpack."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Offer:
        """Read a partner's offer.

        Raises:
            PeerError: MALFORMED.
        """
        return unpack(data, _offer)


_offer = msgspec.msgpack.Decoder(Offer)
NO_OFFER: Final = Offer(0, bytes(TICKET_BYTES))


class Paths:
    """Chooses which of a link's two streams carries bulk.

    The faster one does. The other is tried again now and then. Only large transfers are measured:
    a small one "ends" while it still lies in a socket buffer.
    """

    def __init__(self) -> None:
        self._bytes_per_s: dict[bool, float] = {}
        self._transfers = 0

    def choose(self, num_bytes: int) -> bool:
        """Whether the next transfer goes over the direct stream."""
        untried = [direct for direct in (True, False) if direct not in self._bytes_per_s]
        best = untried[0] if untried else max(self._bytes_per_s, key=self._bytes_per_s.__getitem__)
        if untried or num_bytes < MEASURED_BYTES:
            return best
        self._transfers += 1
        return best != (self._transfers % TRY_OTHER_EVERY == 0)

    def took(self, direct: bool, num_bytes: int, seconds: float) -> None:
        """Note the speed of a transfer.

        Args:
            direct: True iff it went over the direct stream.
            num_bytes: its size.
            seconds: how long it took.
        """
        if num_bytes >= MEASURED_BYTES:
            self._bytes_per_s[direct] = num_bytes / max(seconds, 1e-9)


class Direct:
    """Opens direct streams: accepts them at this node's own port, if it has one, and dials others.

    Args:
        hosts_of: IP addresses at which our sidecar is connected to a peer now.

    Attributes:
        port: TCP port at which we listen; 0 while we do not.
        strangers: connections so far that presented no valid ticket.
    """

    def __init__(self, hosts_of: HostsOf) -> None:
        self.port = self.strangers = 0
        self._hosts_of = hosts_of
        self._door: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._knocking: set[asyncio.Task[None]] = set()
        self._expected: dict[bytes, asyncio.Future[Stream]] = {}
        self._avoided: dict[PeerId, float] = {}

    async def listen(self, address: str) -> None:
        """Listen for direct streams.

        Args:
            address: /ip4|ip6/HOST/tcp/PORT; port 0 = any free one.

        Raises:
            ConfigError: the address is malformed, or its port is in use.
        """
        _, kind, host, _, port = resolve_listen([address], "network.direct_listen")[0].split("/")
        door = socket.socket(socket.AF_INET if kind == "ip4" else socket.AF_INET6)
        try:
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            door.bind((host, int(port)))
            door.listen(MAX_KNOCKING)
            door.setblocking(False)
        except OSError as e:
            door.close()
            raise ConfigError(
                f"network.direct_listen: can't listen on {address}: {e}", "choose another port"
            ) from e
        self._door, self.port = door, door.getsockname()[1]
        self._accepting = asyncio.create_task(self._accept(door))

    async def close(self) -> None:
        """Stop listening. Open streams belong to their links and stay open."""
        tasks = [*self._knocking, *([self._accepting] if self._accepting else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._door is not None:
            self._door.close()
        self.port = 0

    # One link

    def offer(self, peer_id: PeerId) -> Offer:
        """Make our offer to this partner. Pass it to `open` at once."""
        offer = Offer(0 if self._avoids(peer_id) else self.port, secrets.token_bytes(TICKET_BYTES))
        if offer.port:
            loop = asyncio.get_running_loop()
            self._expected[offer.ticket] = loop.create_future()
            loop.call_later(TICKET_S, self._void, offer.ticket)  # `open` may never come
        return offer

    def _void(self, ticket: bytes) -> None:
        knock = self._expected.pop(ticket, None)
        if knock is not None and knock.done():
            knock.result().shutdown()

    async def open(
        self, peer_id: PeerId, session: Session, ours: Offer, theirs: Offer, *, initiator: bool
    ) -> tuple[Stream, Session] | None:
        """Open the direct stream to a partner.

        The initiator dials if the responder listens. Else the responder dials the initiator.

        Args:
            peer_id: the partner.
            session: the link's sealed session; the new one is its child.
            ours: our offer, from `offer`.
            theirs: the partner's offer.
            initiator: whether we opened the session.

        Returns:
            The stream and its session; None if no direct stream could be opened.
        """
        dialling = theirs.port > 0 and (initiator or not ours.port)
        try:
            if dialling:
                stream = await self._dial(peer_id, theirs)
            elif ours.port:
                stream = await self._knock(ours.ticket)
            else:
                return None
            child = session.child(theirs.ticket if dialling else ours.ticket)
            await _greet(stream, child, first=dialling)
        except PeerError as e:
            log.debug("no direct stream with %s: %s", peer_id[-8:], e)
            return None
        finally:
            self._expected.pop(ours.ticket, None)
        return stream, child

    def broke(self, peer_id: PeerId) -> None:
        """Note that a direct stream failed in use: for AVOID_S, bulk goes through libp2p."""
        if len(self._avoided) >= MAX_AVOIDED:
            del self._avoided[next(iter(self._avoided))]
        self._avoided[peer_id] = time.monotonic() + AVOID_S

    def _avoids(self, peer_id: PeerId) -> bool:
        return time.monotonic() < self._avoided.get(peer_id, 0.0)

    async def _knock(self, ticket: bytes) -> Stream:
        """Wait for the stream that presents this ticket. It may have come already."""
        knock = self._expected.get(ticket)
        if knock is None:
            raise PeerError(Reason.TIMEOUT, "the ticket is void")
        try:
            async with asyncio.timeout(TICKET_S):
                return await asyncio.shield(knock)
        except BaseException as e:
            if knock.done():
                knock.result().shutdown()
            if isinstance(e, TimeoutError):
                raise PeerError(Reason.TIMEOUT, "nobody showed the ticket") from e
            raise

    async def _dial(self, peer_id: PeerId, theirs: Offer) -> Stream:
        if self._avoids(peer_id):
            raise PeerError(Reason.REFUSED, "the last direct stream broke")
        loop = asyncio.get_running_loop()
        for host in (await self._hosts_of(peer_id))[:MAX_HOSTS]:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            sock = socket.socket(family, socket.SOCK_STREAM)
            sock.setblocking(False)
            try:
                async with asyncio.timeout(OPEN_TIMEOUT_S):
                    await loop.sock_connect(sock, (host, theirs.port))
                stream = Stream(sock)
                await stream.write(theirs.ticket)
            except (OSError, TimeoutError, PeerError):
                sock.close()
                continue
            except BaseException:
                sock.close()
                raise
            return stream
        raise PeerError(Reason.UNREACHABLE, f"port {theirs.port}")

    # The door

    async def _accept(self, door: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(door)
            except OSError as e:  # e.g. out of file descriptors
                log.warning("network.direct_listen: %s", e)
                await asyncio.sleep(1.0)
                continue
            if len(self._knocking) >= MAX_KNOCKING:
                self.strangers += 1
                sock.close()
                continue
            task = asyncio.create_task(self._hear(Stream(sock)))
            self._knocking.add(task)
            task.add_done_callback(self._knocking.discard)

    async def _hear(self, stream: Stream) -> None:
        """Read a socket's ticket, and hand the socket to the link that waits for it."""
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                knock = self._expected.get(await stream.read(TICKET_BYTES))
        except (TimeoutError, PeerError):
            knock = None
        except BaseException:
            stream.shutdown()
            raise
        if knock is None or knock.done():
            self.strangers += 1
            stream.shutdown()
        else:
            knock.set_result(stream)


async def _greet(stream: Stream, session: Session, *, first: bool) -> None:
    """Exchange empty sealed frames, which prove to each end that the other has the keys."""
    try:
        async with asyncio.timeout(OPEN_TIMEOUT_S):
            if first:
                await stream.write(session.sealer.seal(Kind.MESSAGE, b""))
            header = await stream.read(HEADER.size)
            kind, size = parse_header(header)
            if kind is not Kind.MESSAGE or session.opener.open(header, await stream.read(size)):
                raise PeerError(Reason.MALFORMED, "an empty frame was due")
            if not first:
                await stream.write(session.sealer.seal(Kind.MESSAGE, b""))
    except TimeoutError as e:
        stream.shutdown()
        raise PeerError(Reason.TIMEOUT, "no greeting on the direct stream") from e
    except BaseException:
        stream.shutdown()
        raise
