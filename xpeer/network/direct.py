"""A second stream to a partner, plain TCP beside libp2p's, for bulk: the same sealed frames, fewer
copies. Used where one end listens (`network.direct_listen`) and the other reaches it.

    in the sealed session, each way   OFFER{port, ticket}
    dialler -> listener               ticket, then an empty sealed frame
    listener -> dialler               an empty sealed frame

The frames' keys are a child of the session's, by the listener's ticket, so a stolen ticket opens
nothing. The dialler takes the host from its own sidecar's connection to this partner: no partner
names hosts for us to dial. A stranger who connects is read 16 bytes, within a few seconds, and told
nothing; of such sockets there are few at a time.

What it does not give: hiding the lengths of frames from the wire, which libp2p's Noise does not
hide either; a way through NATs.
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
"""For each step: connecting, showing a ticket, the first frame."""
TICKET_S: Final = 2 * OPEN_TIMEOUT_S
"""A ticket that nobody showed in this time is void."""
MAX_KNOCKING: Final = 32
"""Sockets that have not shown a ticket yet; a further one is closed at once."""
MAX_HOSTS: Final = 4
AVOID_S: Final = 600.0
"""A partner whose direct stream broke in use is served through libp2p for so long."""
MAX_AVOIDED: Final = 1024
MEASURED_BYTES: Final = 4 << 20
"""The least transfer that says something about a stream's speed."""
TRY_OTHER_EVERY: Final = 32
"""Transfers between two of the slower stream."""

HostsOf = Callable[[PeerId], Awaitable[list[str]]]


@seen_by("partners")
class Offer(Struct, frozen=True, forbid_unknown_fields=True):
    """The first message each way in a session."""

    port: Public[Annotated[int, Meta(ge=0, le=65535)]]
    """Where the sender listens; 0 = it does not."""
    ticket: Public[Annotated[bytes, Meta(min_length=TICKET_BYTES, max_length=TICKET_BYTES)]]
    """For one connection, soon."""

    def to_bytes(self) -> bytes:
        """Msgpack."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def from_bytes(cls, data: bytes) -> Offer:
        """A partner's.

        Raises:
            PeerError: MALFORMED.
        """
        return unpack(data, _offer)


_offer = msgspec.msgpack.Decoder(Offer)
NO_OFFER: Final = Offer(0, bytes(TICKET_BYTES))


class Paths:
    """Which of a link's two streams carries bulk: the one that was faster, the other tried again
    now and then. Counts large transfers only: a small one lies in a socket buffer when it "ends".
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
        """Learn from a transfer."""
        if num_bytes >= MEASURED_BYTES:
            self._bytes_per_s[direct] = num_bytes / max(seconds, 1e-9)


class Direct:
    """This node's door, if it has one, and its way to others'.

    Args:
        hosts_of: IP addresses at which our sidecar is connected to a peer now.

    Attributes:
        port: where we listen; 0 = nowhere.
        strangers: connections that showed no valid ticket.
        opened: direct streams so far, either way.
    """

    def __init__(self, hosts_of: HostsOf) -> None:
        self.port = self.strangers = self.opened = 0
        self._hosts_of = hosts_of
        self._door: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._knocking: set[asyncio.Task[None]] = set()
        self._expected: dict[bytes, asyncio.Future[Stream]] = {}
        self._avoided: dict[PeerId, float] = {}

    async def listen(self, address: str) -> None:
        """Open the door.

        Args:
            address: /ip4|ip6/HOST/tcp/PORT; port 0 = any free one.

        Raises:
            ConfigError: malformed, or the port is taken.
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
        """Close the door; streams that are open belong to their links."""
        tasks = [*self._knocking, *([self._accepting] if self._accepting else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._door is not None:
            self._door.close()
        self.port = 0

    # One link

    def offer(self, peer_id: PeerId) -> Offer:
        """What to tell this partner; give it to `open` at once."""
        offer = Offer(0 if self._avoids(peer_id) else self.port, secrets.token_bytes(TICKET_BYTES))
        if offer.port:
            self._expected[offer.ticket] = asyncio.get_running_loop().create_future()
        return offer

    async def open(
        self, peer_id: PeerId, session: Session, ours: Offer, theirs: Offer, *, initiator: bool
    ) -> tuple[Stream, Session] | None:
        """The direct stream to a partner and its session, or None: there is no way.

        The initiator dials if the responder listens; else the responder dials the initiator.

        Args:
            peer_id: the partner.
            session: the sealed one, whose child this becomes.
            ours: from `offer`.
            theirs: the partner's.
            initiator: whether we opened the session.
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
        self.opened += 1
        return stream, child

    def broke(self, peer_id: PeerId) -> None:
        """A direct stream failed in use: libp2p's serves for a while."""
        if len(self._avoided) >= MAX_AVOIDED:
            del self._avoided[next(iter(self._avoided))]
        self._avoided[peer_id] = time.monotonic() + AVOID_S

    def _avoids(self, peer_id: PeerId) -> bool:
        return time.monotonic() < self._avoided.get(peer_id, 0.0)

    async def _knock(self, ticket: bytes) -> Stream:
        """Whoever shows this ticket."""
        knock = self._expected[ticket]
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
            except OSError as e:  # e.g. no descriptor is left
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
        """Hand a socket that shows a valid ticket to the link that waits for it."""
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                knock = self._expected.pop(await stream.read(TICKET_BYTES), None)
        except (TimeoutError, PeerError):
            knock = None
        except BaseException:
            stream.shutdown()
            raise
        if knock is None:
            self.strangers += 1
            stream.shutdown()
        else:
            knock.set_result(stream)


async def _greet(stream: Stream, session: Session, *, first: bool) -> None:
    """An empty sealed frame each way: both hold the keys, and both know it."""
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
