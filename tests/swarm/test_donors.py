"""A joiner of real daemons that loses a donor, and dies itself, in the middle of its transfer."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.swarm import test_daemons
from tests.swarm.gated import PERMITS
from tests.swarm.test_daemons import Swarm
from xpeer.cli.demo import daemons
from xpeer.cli.demo.daemons import call
from xpeer.status import Status
from xpeer.wire.messages import PIECE_BYTES

swarm = test_daemons.swarm
pytestmark = pytest.mark.timeout(240)


class Gate:
    """Closed from the beginning: a donor sends only as many pieces as the test allows."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        folder.mkdir()

    def allow(self, pieces: int) -> None:
        for _ in range(pieces):
            self._count += 1
            (self._folder / str(self._count)).touch()


def here(status: Status) -> int:
    """How many pieces are here."""
    return status.fetching.bytes_done // PIECE_BYTES if status.fetching is not None else -1


def test_a_killed_joiner_goes_on_with_its_pieces_though_a_donor_is_dead(
    swarm: Swarm, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(daemons, "XPEER", (sys.executable, "-m", "tests.swarm.gated"))
    permits = {name: swarm.root / f"permits-{name}" for name in "ab"}
    model = ("--preset", "small", "--privacy", "off")
    swarm.found("a", *model, end__steps=100_000, round__window_steps=50)  # so a and b stay alike
    both = {"XPEER_TRAINING_MIN_PEERS": "1", "XPEER_TRAINING_THROTTLE": "0.3"}
    swarm.start("a", "--bootstrap", **both, **{PERMITS: str(permits["a"])})
    swarm.seed = swarm.until("a", lambda s: s.state == "waiting").addresses[0]
    swarm.join("a", "b", **both, **{PERMITS: str(permits["b"])})
    ids = {name: swarm.until(name, lambda s: s.progress.step > 0).peer_id for name in "ab"}
    for name in "ab":  # from now on they only give
        call(["pause", "--home", str(swarm.home(name).path)])
    gates = {name: Gate(permits[name]) for name in "ab"}
    swarm.join("a", "c")
    given = swarm.until("c", lambda s: s.fetching is not None and len(s.fetching.donors) == 2)
    assert given.fetching is not None
    assert given.fetching.bytes_done == 0
    total = -(-given.fetching.bytes_total // PIECE_BYTES)
    assert sorted(given.fetching.donors) == sorted(ids.values())
    for gate in gates.values():
        gate.allow(2)
    swarm.until("c", lambda s: here(s) == 4)
    os.kill(swarm.until("b", lambda s: True).pid, signal.SIGKILL)
    swarm.until("c", lambda s: s.fetching is not None and s.fetching.donors == [ids["a"]])
    gates["a"].allow(1)
    killed = swarm.until("c", lambda s: here(s) == 5)  # a goes on
    os.kill(killed.pid, signal.SIGKILL)

    gates["a"].allow(total - 1)  # too few to begin anew; the dead joiner's link may use some up
    swarm.start("c", "--bootstrap", "--listen", test_daemons.LOOPBACK, "--shard", swarm.shard("c"))
    assert swarm.until("c", lambda s: s.state == "training").peer_id == killed.peer_id
    call(["resume", "--home", str(swarm.home("a").path)])
    swarm.until("c", lambda s: (s.progress.consensus_distance or 1.0) < 0.3)  # it is in step
    log = swarm.daemons.log("c").read_text()
    assert "5.2 MB of the parameters are here from an earlier start" in log
    took = next(line for line in log.splitlines() if "took over the parameters" in line)
    assert all(peer_id[-8:] in took for peer_id in ids.values())
    assert not swarm.home("c").joining.exists()
