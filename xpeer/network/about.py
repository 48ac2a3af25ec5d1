"""What a member calls itself and how far it is, asked of the member: for its partners' operators.

Nothing depends on the answer. A member of an earlier version gives none, and later ones may say
more: fields that we do not know are left alone.
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
    """A member's own word."""

    name: Public[Annotated[str, Meta(max_length=32, pattern="^[A-Za-z0-9._-]*\\Z")]] = ""
    """As its operator set network.name; "" = none. Two members may have the same."""
    step: Timing[Annotated[int, Meta(ge=0, lt=1 << 40)] | None] = None
    """Local steps done; None = nothing is trained there."""


async def ask(swarm: Swarm, peer_id: PeerId) -> About:
    """Ask.

    Raises:
        PeerError: unreachable, of an earlier version, or it answers nonsense.
    """
    answer = await swarm.call(peer_id, PROTOCOL, b"", TIMEOUT_S)
    if len(answer) > MAX_ANSWER_BYTES:
        raise PeerError(Reason.OVERSIZE, f"{len(answer)} bytes about itself")
    try:
        return msgspec.msgpack.decode(answer, type=About)
    except (msgspec.MsgspecError, UnicodeDecodeError) as e:
        raise PeerError(Reason.MALFORMED, "what it says about itself") from e


async def serve(swarm: Swarm, about: Callable[[], About]) -> None:
    """Answer every member, observers included."""

    async def handle(_peer_id: PeerId, _request: bytes) -> bytes:
        return msgspec.msgpack.encode(about())

    await swarm.serve_call(PROTOCOL, handle, "observer", max_request=0)
