"""Registers this node's handlers on its sidecar, and keeps their errors from other peers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from xpeer.errors import LocalError, PeerError
from xpeer.identity import PeerId
from xpeer.network.direct import Direct
from xpeer.network.link import Link, Meter
from xpeer.network.membership.certificates import Scope
from xpeer.network.p2p import CallHandler, GatedP2P, StreamHandler
from xpeer.network.stream import Stream

log = logging.getLogger("xpeer.network")

LinkHandler = Callable[[Link], Awaitable[None]]


@dataclass(frozen=True)
class Served:
    """One protocol with its handler: of calls, or of links.

    Attributes:
        protocol: its name.
        scope: what the caller's certificate has to allow; None = open to strangers.
        call: the handler, if the protocol is one of calls.
        link: the handler, if the protocol is one of links.
        max_request: bytes of a call, at most.
    """

    protocol: str
    scope: Scope | None
    call: CallHandler | None = None
    link: LinkHandler | None = None
    max_request: int = 0


async def register(p2p: GatedP2P, served: Served, meter: Meter, direct: Direct) -> None:
    """Serve this protocol on a sidecar."""
    if served.call is not None:
        call = _metered(served.call, meter)
        await p2p.serve_call(served.protocol, call, served.scope, served.max_request)
    elif served.link is not None and served.scope is not None:
        await p2p.serve_stream(served.protocol, _linked(served.link, meter, direct), served.scope)


def _metered(handler: CallHandler, meter: Meter) -> CallHandler:
    async def call(peer_id: PeerId, request: bytes) -> bytes:
        reply = await handler(peer_id, request)
        meter.bytes_in += len(request)
        meter.bytes_out += len(reply)
        return reply

    return call


def _linked(handler: LinkHandler, meter: Meter, direct: Direct) -> StreamHandler:
    async def serve(
        peer_id: PeerId, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        link = None
        try:
            link = Link(peer_id, await Stream.adopt(reader, writer), meter=meter, direct=direct)
            await handler(link)
        except PeerError as e:
            log.debug("link from %s ended: %s", peer_id[-8:], e)
        except LocalError as e:
            log.warning("link from %s ended by a fault of ours: %s", peer_id[-8:], e)
        except Exception:  # a bug of ours: it costs this link and is logged
            log.exception("link from %s ended by an error of ours", peer_id[-8:])
        finally:
            if link is not None:
                link.abort()

    return serve
