"""Asks a member for its name and its step, so that operators of other nodes can see them.

A joiner uses the steps, too: they bound what a donor may claim (`xpeer_daemon.claims`). The median
counts there, since nobody can check an answer. Nothing else depends on it. A member of an earlier
version gives none. A later version may say more, so unknown fields are ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from xpeer.errors import PeerError, Reason
from xpeer.identity import PeerId
from xpeer.leaves import Public, Timing, seen_by
from xpeer.network.swarm import Swarm

PROTOCOL = "xpeer/about/1"
MAX_ANSWER_BYTES = 1024
TIMEOUT_S = 5.0


@seen_by("members", "the operator's own word")
class About(Struct, frozen=True):
    """What a member says of itself. Nobody can check it."""

    name: Public[Annotated[str, Meta(max_length=32, pattern="^[A-Za-z0-9._-]*\\Z")]] = ""
    """The operator's setting network.name; "" = none. Two members may have the same name."""
    step: Timing[Annotated[int, Meta(ge=0, lt=1 << 40)] | None] = None
    """Local steps done; None = the member trains nothing."""


async def ask(swarm: Swarm, peer_id: PeerId) -> About:
    """Ask one member.

    Raises:
        PeerError: it is unreachable, has an earlier version, or answers nonsense.
    """
    answer = await swarm.call(peer_id, PROTOCOL, b"", TIMEOUT_S)
    if len(answer) > MAX_ANSWER_BYTES:
        raise PeerError(Reason.OVERSIZE, f"{len(answer)} bytes about itself")
    try:
        return msgspec.msgpack.decode(answer, type=About)
    except (msgspec.MsgspecError, UnicodeDecodeError) as e:
        raise PeerError(Reason.MALFORMED, "what it says about itself") from e


async def serve(swarm: Swarm, about: Callable[[], About]) -> None:
    """Answer all members and observers that ask."""

    async def handle(_peer_id: PeerId, _request: bytes) -> bytes:
        return msgspec.msgpack.encode(about())

    await swarm.serve_call(PROTOCOL, handle, "observer", max_request=0)
