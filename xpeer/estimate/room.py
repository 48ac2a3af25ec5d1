"""What this machine has: memory of the host and of the device, and the disk."""

from __future__ import annotations

import gc
import resource
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil
import torch

_GROUPS: Final = Path("/sys/fs/cgroup")
_OWN: Final = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Room:
    """How much of something there is, in bytes."""

    what: str
    """It in words, e.g. "memory of this machine"."""
    most: int
    """Bytes that a node could have if nobody else had any."""
    free: int
    """Bytes that are free now."""


def host(groups: Path = _GROUPS, own: Path = _OWN) -> Room:
    """Memory for processes: the machine's, or that of a control group, e.g. systemd's MemoryMax.

    Swap counts as something that a node could have, but not as free.

    Args:
        groups: where control groups are mounted.
        own: file that says which groups this process is in.
    """
    memory, swap = psutil.virtual_memory(), int(psutil.swap_memory().total)
    best = Room("memory of this machine", int(memory.total) + swap, int(memory.available))
    for folder in _groups_of(groups, own):
        limit = _number(folder, "memory.max", "memory.limit_in_bytes")
        if limit is None or limit >= memory.total:
            continue
        used = _number(folder, "memory.current", "memory.usage_in_bytes") or 0
        more = _number(folder, "memory.swap.max")
        most = limit + (swap if more is None else min(swap, more))
        free = min(best.free, max(0, limit - used + _reclaimable(folder)))
        if most < best.most:
            best = Room(f"memory that control group {folder.name or '/'} may have", most, free)
        else:
            best = Room(best.what, best.most, free)
    return best


def of_device(device: torch.device) -> Room:
    """Memory of a device; of a device without memory of its own, the host's."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Room(f"memory of {torch.cuda.get_device_name(device)}", total, free)
    return host()


def disk(folder: Path) -> Room:
    """The disk that a folder is on, or will be on.

    Raises:
        OSError: the system can't say.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists())
    usage = shutil.disk_usage(there)
    return Room(f"the disk of {folder}", usage.total, usage.free)


def host_peak() -> int:
    """The most memory that this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def device_peak(device: torch.device) -> int:
    """The most memory of a GPU that tensors of this process have had; 0 on other devices."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def give_back() -> None:
    """Free what nobody uses any more. The parts of a trainer know one another, so that it stays
    after its last user until Python looks for such circles.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _groups_of(groups: Path, own: Path) -> Iterator[Path]:
    """The folders of this process's control groups, from its own up to the root's."""
    try:
        lines = own.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, kinds, path = [*line.split(":", 2), "", ""][:3]
        if kinds and "memory" not in kinds.split(","):
            continue
        root = groups / "memory" if kinds else groups
        folder = root / path.lstrip("/")
        while True:
            if folder.is_dir():  # in a container, paths may be the host's
                yield folder
            if folder == root or root not in folder.parents:
                break
            folder = folder.parent


def _number(folder: Path, *names: str) -> int | None:
    """The number in the first of these files that is there; None = no limit."""
    for name in names:
        try:
            return int((folder / name).read_text())
        except (OSError, ValueError):  # "max"
            continue
    return None


def _reclaimable(folder: Path) -> int:
    """Bytes of files that a control group has in memory: they give way."""
    try:
        words = (folder / "memory.stat").read_text().split()
    except OSError:
        return 0
    found = dict(zip(words[::2], words[1::2], strict=False))
    kinds = ("inactive_file", "active_file")
    return sum(int(found[kind]) for kind in kinds if found.get(kind, "").isdigit())
