"""Work on another thread that has to end before what it uses is given away."""

from __future__ import annotations

import asyncio


async def to_its_end(work: asyncio.Future[None]) -> None:
    """Wait for work, however often we are cancelled; a stop may come after a timeout.

    Raises:
        CancelledError: we were cancelled meanwhile. The work has ended.
    """
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError as e:
            cancelled = e
    work.result()
    if cancelled is not None:
        raise cancelled
