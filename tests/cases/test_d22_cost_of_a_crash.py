"""D22: a kill forfeited all that was charged since a checkpoint of ten minutes ago."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import psutil
import pytest

from tests.cases.support import Nodes, found, trainer_of, xpeer
from xpeer.accounts.ledger import Ledger
from xpeer.config import Home

WINDOW = 5


def charged(home: Path) -> int:
    with Ledger.look(Home(home).ledger_db) as ledger:
        return ledger.steps_charged


def saved(home: Path) -> int:
    """The step of the newest checkpoint; 0: there is none."""
    names = [path.name for path in (home / "checkpoints").glob("ckpt-*.safetensors")]
    return max((int(name[5:-12]) for name in names), default=0)


def lacked(log: str) -> int:
    """Steps that a kill between the register's row and the ledger's cost: charged at the start."""
    found = re.search(r"ledger lacked (\d+) steps", log)
    return int(found[1]) if found else 0


@pytest.mark.timeout(180)
def test_kills_forfeit_a_window_each(nodes: Nodes, shard: Path) -> None:
    """Of 300 planned steps; whatever was charged while a checkpoint was written may come on top,
    which is another window at most where that takes no longer.
    """
    home = nodes.home("a")
    found(home, shard, fields=["end.steps=300"])
    step, forfeited = 0, 0
    for life in range(2):
        nodes.start("a")
        nodes.until("a", lambda s, least=step + 12: s.progress.step >= least)  # type: ignore[misc]
        pids = [trainer_of(nodes.pid("a")), nodes.pid("a")]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(p) for p in pids if psutil.pid_exists(p)], timeout=20)
        step = saved(home)
        lost, forfeited = charged(home) - forfeited - step, charged(home) - step
        assert 0 <= lost <= 2 * WINDOW, f"life {life}: {lost} steps were charged and are lost"
    before = charged(home)  # until it charges more, it tells what the trainer before it said
    nodes.start("a")  # with a log of its own
    status = nodes.until("a", lambda s: s.privacy.steps_charged > before + WINDOW)
    forfeited += lacked(nodes.log("a"))
    assert status.privacy.steps_forfeited == forfeited
    told = xpeer("status", "--home", home).stdout
    assert not forfeited or f"{forfeited} of these steps" in told
    assert nodes.stop("a") == 0
