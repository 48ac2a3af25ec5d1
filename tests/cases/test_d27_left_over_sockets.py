"""D27: what killed nodes leave in TMPDIR is removed at the next start, and nothing else is."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cases.support import LOOPBACK, Nodes
from xpeer.cli.demo.daemons import first_address


@pytest.mark.timeout(180)
def test_the_folder_of_a_killed_node_goes_at_the_next_start(nodes: Nodes) -> None:
    """An entry point starts quickest, and has the same sidecar."""
    command = ["bootstrap", "--home", str(nodes.home("a")), "--swarm", "ab" * 32]
    settings = {"TMPDIR": str(nodes._sockets)}

    def start() -> None:
        nodes.daemons.start("a", [*command, "--listen", LOOPBACK, "--json"], settings)
        first_address(nodes.daemons, "a", 90)

    start()
    family = psutil.Process(nodes.pid("a")).children(recursive=True)
    (left,) = nodes._sockets.glob("xpeer-*")
    os.kill(nodes.pid("a"), signal.SIGKILL)
    nodes.daemons.forget("a")
    for process in family:  # a sidecar may outlive its node
        if process.is_running():
            process.kill()
    psutil.wait_procs(family, timeout=10)
    start()
    assert left not in list(nodes._sockets.glob("xpeer-*"))
    assert nodes.stop("a") == 0
    assert not list(nodes._sockets.glob("xpeer-*"))


def dead(path: Path) -> None:
    """A socket file that nobody listens on."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def made(folder: Path, name: str) -> Path:
    path = folder / name
    path.mkdir(mode=0o700)
    return path


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="xt-"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    shutil.rmtree(folder)


def test_only_folders_of_the_dead_are_removed(temporary: Path) -> None:
    from xpeer.network.scratch import Scratch, sweep

    gone = made(temporary, "xpeer-aaaaaaaa")
    dead(gone / "p2pd-x_Y-1.sock")
    dead(gone / "p2pclient-x.sock")
    old = made(temporary, "xpeer-bbbbbbbb")
    os.utime(old, (time.time() - 7200,) * 2)

    kept = [made(temporary, f"xpeer-cccccc{n:02}") for n in range(5)]
    dead(kept[0] / "p2pd-x.sock")
    (kept[0] / "notes.txt").write_text("mine")
    (kept[1] / "p2pd-x.sock").write_text("no socket")
    (kept[2] / "p2pd-x.sock").symlink_to(gone)
    dead(kept[3] / "p2pd-x.sock")
    kept[3].chmod(0o755)
    # kept[4] is empty and new: a node may be starting
    other = made(temporary, "xpeer-data")
    dead(other / "p2pd-x.sock")
    target = made(temporary, "elsewhere")
    dead(target / "p2pd-x.sock")
    link = temporary / "xpeer-dddddddd"
    link.symlink_to(target)
    running = Scratch.make()
    dead(running.path / "p2pd-x.sock")
    orphan = made(temporary, "xpeer-eeeeeeee")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(orphan / "p2pd-x.sock"))
        listener.listen()
        assert sweep() == 2
    left = set(temporary.iterdir())
    assert left == {*kept, other, target, link, running.path, orphan}
    assert (target / "p2pd-x.sock").exists()
    running.close()
    assert not running.path.exists()
