"""Writes a row of losses.csv and a line of the log at the end of every window.

The file has losses on private text; it stays in the home, with mode 0600. The log line has the
public loss alone.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from xpeer.errors import ConfigError
from xpeer.files import open_own
from xpeer_daemon.node import Node
from xpeer_daemon.report import eta_unix_s
from xpeer_daemon.store import Known

log = logging.getLogger("xpeer.windows")

SCHEMA: Final = 1
COLUMNS: Final = (
    "schema", "unix_s", "step", "window", "loss_public", "loss_train", "loss_validation",
    "epsilon", "exchanges", "bytes_in", "bytes_out",
)  # fmt: skip
"""Columns of losses.csv. An empty cell was not measured. epsilon is what was spent so far, at most,
on any text. The last three columns count from the daemon's start."""
HEADER: Final = ",".join(COLUMNS) + "\n"
MAX_FILE_BYTES: Final = 5_000_000
KEPT_EVERY_S: Final = 10.0


class Windows:
    """Notices that a window is over, and writes it down.

    Args:
        path: losses.csv. When it is full it is renamed to `.1`, in place of an earlier one.
        node: knows the numbers to write down.
        remember: keeps the trainer's last counters for the daemon's next start.
    """

    def __init__(self, path: Path, node: Node, remember: Callable[[Known], None]) -> None:
        self._path = path
        self._node = node
        self._remember = remember
        self._window: int | None = None
        self._kept_s = -KEPT_EVERY_S

    def poll(self) -> None:
        """Write down the last window, if another one has begun."""
        known = self._node.record.known
        if known is None:
            return
        before, self._window = self._window, known.progress.window
        if before is None or known.progress.window == before:
            return  # the first window that we hear of was written down before
        if known.progress.window < before:
            return  # this is another trainer, which resumed from an older checkpoint
        if known.unix_s - self._kept_s >= KEPT_EVERY_S:
            self._kept_s = known.unix_s
            self.remember()
        self._add_row(known)
        log.info("%s", self._line(known))

    def remember(self) -> None:
        """Keep the trainer's last counters, for a status after the daemon's next start."""
        if self._node.record.known is not None:
            self._remember(self._node.record.known)

    def _add_row(self, known: Known) -> None:
        progress, node = known.progress, self._node
        meter = node.swarm.meter
        cells = (
            SCHEMA, round(node.clock(), 3), progress.step, progress.window,
            progress.loss_public, progress.loss_train, progress.loss_validation,
            known.privacy.epsilon_spent if known.privacy and known.privacy.policy.charges else None,
            self._exchanges(), meter.bytes_in, meter.bytes_out,
        )  # fmt: skip
        row = ",".join("" if cell is None else f"{cell:.10g}" for cell in cells) + "\n"
        try:
            append(self._path, row)
        except (OSError, ConfigError) as e:  # a full disk: a row is lost, training goes on
            node.health.failed("losses-failing", e)
        else:
            node.health.worked("losses-failing")

    def _exchanges(self) -> int:
        return self._node.member.partners.exchanges if self._node.member else 0

    def _line(self, known: Known) -> str:
        progress, privacy, node = known.progress, known.privacy, self._node
        planned = f"/{progress.planned_steps}" if progress.planned_steps else ""
        parts = [f"step {progress.step}{planned}"]
        if progress.loss_public is not None:
            parts.append(f"public loss {progress.loss_public:.4f}")
        if privacy is not None and privacy.policy.charges:
            parts.append(f"epsilon {privacy.epsilon_spent:.3f} of {privacy.epsilon_target:g}")
        parts.append(f"{self._exchanges()} exchanges")
        parts.append(f"{progress.tokens_per_s:,.0f} tokens/s")
        if (eta := eta_unix_s(node)) is not None:
            parts.append(time.strftime("ETA %Y-%m-%d %H:%M UTC", time.gmtime(eta)))
        return ", ".join(parts)


def append(path: Path, row: str) -> None:
    """Add a row. A file that is full, or has other columns, is moved to `.1` first.

    Raises:
        OSError, ConfigError: it can't be written.
    """
    fd = open_own(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    with os.fdopen(fd, "r+b", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(0)
        if size == 0 or (size < MAX_FILE_BYTES and file.read(len(HEADER)) == HEADER.encode()):
            file.seek(max(0, size - 1))
            torn = file.read(1) not in (b"", b"\n")  # the machine lost power while it was written
            _write(file.fileno(), (("\n" if torn else "") if size else HEADER) + row)
            return
    path.replace(path.with_name(path.name + ".1"))
    append(path, row)


def _write(fd: int, text: str) -> None:
    """Write all of the text or nothing: half a row would spoil the next one."""
    before, data = os.fstat(fd).st_size, text.encode()
    if os.write(fd, data) != len(data):
        os.ftruncate(fd, before)
        raise OSError(28, "no space left on the device")
