"""Asking a member with a lower PeerID to propose an exchange: links are opened by the lower one."""

from __future__ import annotations

from collections.abc import Callable

from xpeer.identity import PeerId
from xpeer.network.swarm import Swarm

PROTOCOL = "xpeer/nudge/1"


async def ask(swarm: Swarm, peer_id: PeerId) -> None:
    """Ask; whether it will is its own business.

    Raises:
        PeerError: unreachable.
    """
    await swarm.call(peer_id, PROTOCOL, b"")


async def serve(swarm: Swarm, nudged: Callable[[PeerId], None]) -> None:
    """Tell of every member that asks."""

    async def handle(peer_id: PeerId, _request: bytes) -> bytes:
        nudged(peer_id)
        return b""

    await swarm.serve_call(PROTOCOL, handle, "member", max_request=0)
