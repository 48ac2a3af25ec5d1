"""Examines the node's health every two seconds, and logs what changes.

Ages of conditions are right because they are examined all the time, not just for a status.
"""

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
"""The disk should have space for this many checkpoints, ..."""
BYTES_PER_PARAM = 12
"""Bytes of a checkpoint for each parameter: its value and two moments, float32."""
LEAST_FREE_BYTES = 64_000_000
"""... and for logs, ledger and history."""


async def keep_watching(node: Node, home: Home) -> None:
    """Examine the node's health every `EVERY_S`, until cancelled."""
    logged: dict[str, HealthReason] = {}
    looked_s = -DISK_EVERY_S
    loop, lag = asyncio.get_running_loop(), Lag(node.health, node.clock)
    while True:
        if loop.time() - looked_s >= DISK_EVERY_S:
            looked_s = loop.time()
            free = await asyncio.to_thread(free_bytes, home.path)
            look_at_disk(node, free)
        logged = log_changes(logged, node.reasons())
        await lag.sleep(EVERY_S)


def log_changes(
    logged: dict[str, HealthReason], reasons: list[HealthReason]
) -> dict[str, HealthReason]:
    """Log which conditions began and which are over. Notes are for status alone.

    Args:
        logged: what the last call returned; empty at first.
        reasons: active conditions now.

    Returns:
        Active conditions by code, without notes.
    """
    now = {reason.code: reason for reason in reasons if reason.severity != "note"}
    for code, reason in now.items():
        if code not in logged:
            log.warning("%s: %s - %s", code, reason.text, reason.remedy)
    for code in logged.keys() - now.keys():
        log.info("%s is over", code)
    return now


def free_bytes(folder: Path) -> int | None:
    """Free bytes of the folder's disk; None if the system can't say."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def look_at_disk(node: Node, free: int | None) -> None:
    """Note whether the disk still has space for what a run writes next."""
    num_params = node.member.manifest.model.num_params if node.member else 0
    needed = CHECKPOINTS_FREE * BYTES_PER_PARAM * num_params + LEAST_FREE_BYTES
    node.health.hold(
        "disk-nearly-full",
        free is not None and free < needed,
        free=f"{(free or 0) / 1e6:,.0f} MB",
        needed=f"{needed / 1e6:,.0f} MB",
    )
