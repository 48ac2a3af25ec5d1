"""Asking a member with a lower PeerID to propose an exchange, since only that side opens links."""

from __future__ import annotations

from collections.abc import Callable

from xpeer.identity import PeerId
from xpeer.network.swarm import Swarm

PROTOCOL = "xpeer/nudge/1"


async def ask(swarm: Swarm, peer_id: PeerId) -> None:
    """Ask this member to propose. It need not do so.

    Raises:
        PeerError: it is unreachable.
    """
    await swarm.call(peer_id, PROTOCOL, b"")


async def serve(swarm: Swarm, nudged: Callable[[PeerId], None]) -> None:
    """Call `nudged` for every member that asks."""

    async def handle(peer_id: PeerId, _request: bytes) -> bytes:
        nudged(peer_id)
        return b""

    await swarm.serve_call(PROTOCOL, handle, "member", max_request=0)
