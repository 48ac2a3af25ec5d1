"""`xpeer`, but a donor sends each piece for a permit: a file in the folder that `PERMITS` names.

A test stops a transfer with it where it wants. While there is no such folder, all is as usual.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from xpeer.cli import main
from xpeer.network.uplink import Uplink

PERMITS = "DONORS_PERMITS"


async def take(self: Uplink, num_bytes: int) -> None:
    """Wait for a permit, and use it up."""
    del self, num_bytes
    folder = Path(os.environ[PERMITS])
    while folder.exists():
        if permit := next(folder.iterdir(), None):
            permit.unlink()
            return
        await asyncio.sleep(0.02)  # another process's files have no event here


if __name__ == "__main__":
    if PERMITS in os.environ:
        setattr(Uplink, "take", take)  # noqa: B010 - a method of the product
    main()
