"""D29: a founder that was killed before its first checkpoint came back at step 0 with the initial
model, and mixed it into a swarm at step 46.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from tests.cases.support import LOOPBACK, Nodes, sets, xpeer

FIELDS = (
    "optimiser.batch_records=8", "optimiser.sequence_tokens=64", "round.fragments=1",
    "round.window_steps=5", "round.slot_s=0.25", "end.steps=100000",
)  # fmt: skip


@pytest.mark.timeout(240)
def test_a_founder_that_lost_its_state_takes_over_a_members_parameters(
    nodes: Nodes, shard: Path
) -> None:
    founder, other = nodes.home("founder"), nodes.home("other")
    done = xpeer(
        "init", "--swarm", "s", "--home", founder, "--listen", LOOPBACK, "--shard", shard,
        "--preset", "tiny", "--privacy", "off", *sets(*FIELDS),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    slow = {"XPEER_TRAINING_THROTTLE": "0.3"}
    nodes.start("founder", "--min-peers", "1", **slow)
    address = nodes.until("founder", lambda s: bool(s.addresses)).addresses[0]
    token = xpeer("invite", "create", "--home", founder, "--seed", address).stdout.strip()
    done = xpeer(
        "init", "--join", token, "--home", other, "--listen", LOOPBACK, "--shard", shard
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    nodes.start("other", **slow)
    nodes.until("other", lambda s: s.progress.step >= 30 and s.exchanges_done > 0)
    os.kill(nodes.pid("founder"), signal.SIGKILL)
    shutil.rmtree(founder / "checkpoints", ignore_errors=True)
    there = nodes.until("other", lambda s: s.progress.step >= 46).progress.step
    nodes.start("founder", **slow)
    back = nodes.until("founder", lambda s: s.state == "training" and s.progress.step > 0)
    assert back.progress.step >= there
    assert list((founder / "checkpoints").iterdir())  # at once, so that it is not lost again
