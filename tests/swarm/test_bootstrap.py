"""`xpeer bootstrap` as a process: what it prints, what it refuses, and how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.swarm.conftest import LOOPBACK, Founder
from xpeer.config import Home
from xpeer.errors import ExitCode
from xpeer.identity import Identity
from xpeer.network.membership.invites import create_token
from xpeer.network.swarm import Swarm

SWARM_ID = "ab" * 32
Run = Callable[..., "subprocess.Popen[str]"]
pytestmark = pytest.mark.timeout(90)


@pytest.fixture
def run() -> Iterator[Run]:
    """Start `xpeer bootstrap ARGS`; whatever still runs is killed in the end."""
    with ExitStack() as ending:
        # Short: the path of a socket may have 107 bytes, and tests in parallel have long folders.
        sockets = Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="xt-")))

        def start(*args: str, **variables: str) -> subprocess.Popen[str]:
            env = {k: v for k, v in os.environ.items() if not k.startswith("XPEER_")}
            process = subprocess.Popen(
                [sys.executable, "-m", "xpeer.cli", "bootstrap", *args],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**env, "TMPDIR": str(sockets), **variables},
            )
            ending.enter_context(process)
            ending.callback(process.kill)
            return process

        yield start
        # the sidecar's sockets lie in a folder of TMPDIR
        assert not [p for p in sockets.iterdir() if p.name.startswith(("xpeer-", "hivemind-"))]


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise AssertionError(process.communicate()[1])
    return line


def sidecars(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_prints_addresses_is_ready_and_ends(run: Run, tmp_path: Path, number: signal.Signals):
    home = tmp_path / "home"
    notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    notified.bind(str(tmp_path / "notify"))
    notified.settimeout(60)
    with notified:
        node = run(
            "--home", str(home), "--swarm", SWARM_ID, "--listen", LOOPBACK, "--json",
            NOTIFY_SOCKET=str(tmp_path / "notify"),
        )  # fmt: skip
        said = json.loads(line_of(node))
        assert said["swarm_id"] == SWARM_ID
        peer_id = Identity.load(Home(home).identity_key).peer_id
        assert said["addresses"]
        assert all(a.startswith("/ip4/127.0.0.1/tcp/") for a in said["addresses"])
        assert all(a.endswith(f"/p2p/{peer_id}") for a in said["addresses"])
        assert notified.recv(1000).startswith(b"READY=1")
        children = sidecars(node.pid)
        assert children
        node.send_signal(number)
        out, err = node.communicate(timeout=30)
    assert (node.returncode, out) == (0, "")
    assert "Traceback" not in err
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert stat.S_IMODE(Home(home).identity_key.stat().st_mode) == 0o400


def test_the_second_on_a_home_is_refused_and_the_identity_stays(run: Run, tmp_path: Path):
    args = ["--home", str(tmp_path / "home"), "--swarm", SWARM_ID, "--listen", LOOPBACK]
    first = run(*args)
    address = line_of(first)
    second = run(*args)
    _, err = second.communicate(timeout=60)
    assert second.returncode == ExitCode.ERROR
    assert "another node runs on home" in err
    first.terminate()
    _, err = first.communicate(timeout=30)
    assert f"xpeer start --bootstrap {address.strip()}" in err
    again = run(*args)
    assert line_of(again).rpartition("/p2p/")[2] == address.rpartition("/p2p/")[2]
    again.terminate()
    assert again.wait(30) == 0


def test_settings_come_from_variables_and_what_is_announced_is_printed(run: Run, tmp_path: Path):
    announced = "/dns4/seed.example/tcp/4001"
    node = run(
        "--home", str(tmp_path / "home"), "--swarm", SWARM_ID, "--announce", announced,
        XPEER_NETWORK_LISTEN=LOOPBACK,
    )  # fmt: skip
    assert line_of(node).startswith(f"{announced}/p2p/12D3Koo")
    node.terminate()
    assert node.wait(30) == 0


def test_all_interfaces_are_printed_by_address_and_none_as_zero(run: Run, tmp_path: Path):
    node = run(
        "--home", str(tmp_path / "home"), "--swarm", SWARM_ID, "--json",
        "--listen", "/ip4/0.0.0.0/tcp/0",
    )  # fmt: skip
    addresses = json.loads(line_of(node))["addresses"]
    assert addresses
    assert not any("/0.0.0.0/" in a or "/tcp/0/" in a for a in addresses)
    outside = [a for a in addresses if not a.startswith("/ip4/127.")]
    assert outside in ([], addresses)
    node.terminate()
    assert node.wait(30) == 0


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        ([], 8, "--swarm and --join"),
        (["--swarm", "xyz"], 8, "64 hex digits"),
        (["--swarm", SWARM_ID, "--listen", "nonsense"], 8, "network.listen"),
        (["--swarm", SWARM_ID, "--listen", "/ip4/127.0.0.1/udp/1/quic"], 8, "network.listen"),
        (
            ["--swarm", SWARM_ID, "--listen", LOOPBACK, "--bootstrap", "/ip4/1.2.3.4/tcp/1"],
            8,
            "network.bootstrap",
        ),
    ],
)
def test_what_is_wrong_is_named(run: Run, tmp_path: Path, args: list[str], code: int, said: str):
    node = run("--home", str(tmp_path / "home"), *args)
    out, err = node.communicate(timeout=60)
    assert (node.returncode, out) == (code, "")
    assert said in err
    assert "Traceback" not in err
    assert not Home(tmp_path / "home").identity_key.exists()


def test_a_taken_port_is_named(run: Run, tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        node = run(
            "--home", str(tmp_path / "home"), "--swarm", SWARM_ID,
            "--listen", f"/ip4/127.0.0.1/tcp/{port}",
        )  # fmt: skip
        _, err = node.communicate(timeout=60)
    assert node.returncode == ExitCode.BAD_CONFIG
    assert "can't listen" in err


async def test_peers_join_through_it_and_others_trust_its_token(
    run: Run, tmp_path: Path, founder: Founder, launch
):
    home = Home(tmp_path / "home")
    home.path.mkdir()
    identity = Identity.generate()
    identity.save(home.identity_key)
    token = create_token(
        founder.admin, founder.genesis, name="test", seeds=[], for_peer=identity.peer_id,
        role="infrastructure", ttl_s=600, now_unix_s=time.time(),
    )  # fmt: skip
    node = run(
        "--home", str(home.path), "--join", str(token), "--listen", LOOPBACK, "--json",
    )  # fmt: skip
    said = json.loads(line_of(node))
    assert said["swarm_id"] == founder.swarm_id
    peer: Swarm = await launch(seeds=said["addresses"])
    await asyncio.wait_for(peer.bootstrapping.reached.wait(), 30)
    certificate = peer.membership.certificate_of(identity.peer_id)
    assert certificate is not None
    assert certificate.role == "infrastructure"
    assert peer.neighbours == 1
    node.terminate()
    assert node.wait(30) == 0
