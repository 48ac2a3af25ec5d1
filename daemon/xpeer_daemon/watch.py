"""Looks at the node's health all the time, so that ages are right, and logs what changes."""

from __future__ import annotations

import asyncio
import logging
import shutil
from pathlib import Path

from xpeer.config import Home
from xpeer.health import HealthReason
from xpeer_daemon.lag import Lag
from xpeer_daemon.node import Node

log = logging.getLogger("xpeer.health")

EVERY_S = 2.0
DISK_EVERY_S = 30.0
CHECKPOINTS_FREE = 2
BYTES_PER_PARAM = 12
"""Of a checkpoint: parameters and two moments, float32."""
LEAST_FREE_BYTES = 64_000_000
"""For logs, ledger and state."""


async def keep_watching(node: Node, home: Home) -> None:
    """Until cancelled."""
    told: dict[str, HealthReason] = {}
    looked_s = -DISK_EVERY_S
    loop, lag = asyncio.get_running_loop(), Lag(node.health, node.clock)
    while True:
        if loop.time() - looked_s >= DISK_EVERY_S:
            looked_s = loop.time()
            free = await asyncio.to_thread(free_bytes, home.path)
            look_at_disk(node, free)
        told = tell(told, node.reasons())
        await lag.sleep(EVERY_S)


def tell(told: dict[str, HealthReason], reasons: list[HealthReason]) -> dict[str, HealthReason]:
    """Log what is new and what is over; notes are for status alone."""
    now = {reason.code: reason for reason in reasons if reason.severity != "note"}
    for code, reason in now.items():
        if code not in told:
            log.warning("%s: %s - %s", code, reason.text, reason.remedy)
    for code in told.keys() - now.keys():
        log.info("%s is over", code)
    return now


def free_bytes(folder: Path) -> int | None:
    """On its disk; None if nobody can say."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def look_at_disk(node: Node, free: int | None) -> None:
    """Whether what a run writes next still fits."""
    num_params = node.member.manifest.model.num_params if node.member else 0
    needed = CHECKPOINTS_FREE * BYTES_PER_PARAM * num_params + LEAST_FREE_BYTES
    node.health.hold(
        "disk-nearly-full",
        free is not None and free < needed,
        free=f"{(free or 0) / 1e6:,.0f} MB",
        needed=f"{needed / 1e6:,.0f} MB",
    )
