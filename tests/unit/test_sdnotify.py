"""sd_notify over real datagram sockets, in the file system and abstract."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from xpeer.sdnotify import notify, watchdog_interval_s


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_message_arrives(tmp_path: Path, kind: str) -> None:
    name = str(tmp_path / "notify") if kind == "path" else f"@xpeer-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(name.replace("@", "\0"))
        receiver.settimeout(10)
        assert notify("READY=1\nSTATUS=training", {"NOTIFY_SOCKET": name})
        assert receiver.recv(100) == b"READY=1\nSTATUS=training"


@pytest.mark.parametrize("address", ["", "relative", "vsock:2:1"])
def test_without_systemd_nothing_is_sent(address: str) -> None:
    assert not notify("READY=1", {"NOTIFY_SOCKET": address})
    assert not notify("READY=1", {})


def test_a_supervisor_that_went_away_is_no_error(tmp_path: Path) -> None:
    assert not notify("READY=1", {"NOTIFY_SOCKET": str(tmp_path / "gone")})


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"WATCHDOG_USEC": "120000000", "WATCHDOG_PID": "7"}, 60.0),
        ({"WATCHDOG_USEC": "120000000"}, 60.0),
        ({"WATCHDOG_USEC": "120000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_watchdog_interval(environ: dict[str, str], expected: float | None) -> None:
    assert watchdog_interval_s(environ, pid=7) == expected
