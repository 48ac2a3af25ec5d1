"""Reports the service's state to systemd: sd_notify(3) over its datagram socket.

Without systemd (no NOTIFY_SOCKET) every call does nothing.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


def notify(state: str, environ: Mapping[str, str] = os.environ) -> bool:
    r"""Send one message. True iff systemd received it.

    Args:
        state: e.g. "READY=1", "WATCHDOG=1", "STOPPING=1", "STATUS=text"; several joined by "\n".
        environ: where NOTIFY_SOCKET is looked up.
    """
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):  # an abstract socket: no file, its name starts with a zero byte
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.connect(address)
            sender.sendall(state.encode())
        except OSError:  # a node must not fail because its supervisor is away
            return False
    return True


def extend(seconds: float, environ: Mapping[str, str] = os.environ) -> bool:
    """Ask for this much time to start or stop, from now on. True iff systemd received it."""
    return notify(f"EXTEND_TIMEOUT_USEC={max(1, int(seconds * 1e6))}", environ)


def watchdog_interval_s(
    environ: Mapping[str, str] = os.environ, pid: int | None = None
) -> float | None:
    """Seconds between two WATCHDOG=1: half of WatchdogSec. None if nobody watches this process.

    Args:
        environ: where WATCHDOG_USEC and WATCHDOG_PID are looked up.
        pid: our process; a child that inherited the variables is not watched. None = `os.getpid()`.
    """
    usec, watched = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not usec.isdecimal() or int(usec) == 0:
        return None
    if watched and watched != str(os.getpid() if pid is None else pid):
        return None
    return int(usec) / 2e6
