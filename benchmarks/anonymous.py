"""Anonymous memory of a process and of all that it started: what is no page of a file.

The kernel takes back the pages of files when they are wanted, so they are no need of a program.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import psutil

_PAUSE_S: Final = 0.03
_PAUSES: Final = 30
"""Looking at gigabytes takes long, and the core. There is a pause of so many times that."""
_SHARE: Final = re.compile(r"^Pss_Anon:\s+(\d+) kB", re.MULTILINE)
_WHOLE: Final = re.compile(r"^RssAnon:\s+(\d+) kB", re.MULTILINE)


def most_of(running: subprocess.Popen[str]) -> int:
    """Wait for the end of a process; the most bytes that it and its descendants had together."""
    most = 0
    while running.poll() is None:
        began = time.monotonic()
        most = max(most, together(_family(running.pid)))
        time.sleep(max(_PAUSE_S, _PAUSES * (time.monotonic() - began)))
    return most


def together(processes: Iterable[int]) -> int:
    """Bytes of these processes. A page that several of them share after a fork counts once, where
    the kernel says so.
    """
    return sum(_of(process) for process in processes)


def _of(process: int) -> int:
    for name, line in (("smaps_rollup", _SHARE), ("status", _WHOLE)):
        try:
            found = line.search(Path(f"/proc/{process}/{name}").read_text())
        except OSError:  # it has ended
            continue
        if found is not None:
            return int(found[1]) << 10
    return 0


def _family(process: int) -> list[int]:
    try:
        return [process, *(p.pid for p in psutil.Process(process).children(recursive=True))]
    except psutil.NoSuchProcess:
        return []
