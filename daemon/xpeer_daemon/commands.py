"""What the control socket answers: a method for each route of `xpeer.control.ROUTES`."""

from __future__ import annotations

import os
from typing import Protocol

from xpeer import __version__
from xpeer.control import Done, End, Peers, Version
from xpeer.status import Status


class ControlledNode(Protocol):
    """The node as it is commanded; called on the event loop."""

    def status(self) -> Status:
        """Everything the node says of itself. Quick: no IO."""

    async def pause(self) -> str:
        """Pause; the phase then."""

    async def resume(self) -> str:
        """Undo a pause; the phase then."""

    def request_stop(self, *, leave: bool, followed: bool = False) -> None:
        """Stop, and perhaps leave the swarm: returns at once, the node ends later.

        Args:
            leave: leave the swarm.
            followed: a client will ask how the end went.
        """

    async def checkpoint(self) -> str:
        """Save; the written file's path."""

    async def end(self) -> End:
        """How far the node's end is, after a moment or when it is over."""


class Commands:
    """Answers, and nothing else: what they need is asked of the node.

    Args:
        node: ours.
    """

    def __init__(self, node: ControlledNode) -> None:
        self._node = node

    async def status(self) -> Status:
        """Everything the node says of itself."""
        return self._node.status()

    async def peers(self) -> Peers:
        """The members of the swarm as the node sees them."""
        return Peers(peers=self._node.status().partners)

    async def version(self) -> Version:
        """The daemon's version and pid."""
        return Version(version=__version__, pid=os.getpid())

    async def end(self) -> End:
        """How far the node's end is."""
        return await self._node.end()

    async def pause(self) -> Done:
        """Take no steps and no exchanges until `resume`."""
        return Done(pid=os.getpid(), state=await self._node.pause())

    async def resume(self) -> Done:
        """Undo `pause`."""
        return Done(pid=os.getpid(), state=await self._node.resume())

    async def stop(self) -> Done:
        """End; the answer comes before the end."""
        self._node.request_stop(leave=False, followed=True)
        return Done(pid=os.getpid())

    async def leave(self) -> Done:
        """Tell the members, then end."""
        self._node.request_stop(leave=True, followed=True)
        return Done(pid=os.getpid())

    async def checkpoint(self) -> Done:
        """Save now."""
        return Done(pid=os.getpid(), path=await self._node.checkpoint())
