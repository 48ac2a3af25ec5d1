"""D24 with whole daemons: partners that die are named until they are back."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.swarm.test_daemons import LOOPBACK, Swarm, swarm  # noqa: F401 - a fixture
from xpeer.cli import main
from xpeer.conditions import CONDITIONS
from xpeer.errors import ExitCode
from xpeer.health import HealthReason
from xpeer.status import Status

PATIENCE_S = 150.0
pytestmark = pytest.mark.timeout(600)


def lost(status: Status) -> HealthReason | None:
    """What is said of lost partners, if anything."""
    return next((reason for reason in status.reasons if reason.code == "partners-lost"), None)


def said(status: Status) -> str:
    """Its text; empty = nothing."""
    reason = lost(status)
    return reason.text if reason is not None else ""


def printed(home: Path) -> tuple[int, str]:
    """Exit code and text of `xpeer status`, on one line whatever the terminal's width."""
    done = CliRunner().invoke(main, ["status", "--exit-code", "--home", str(home)])
    return done.exit_code, " ".join(done.output.split())


def test_two_of_three_members_are_killed_and_come_back(swarm: Swarm) -> None:  # noqa: F811
    slow = {"XPEER_TRAINING_THROTTLE": "0.05"}  # one exchange will do: most of it is waiting
    swarm.bootstrap(swarm.found("a", end__steps=100_000))
    swarm.start("a", "--bootstrap", swarm.seed, **slow)
    swarm.until("a", lambda s: s.state == "training", PATIENCE_S)
    for name in "bc":
        swarm.join("a", name, **slow)
    pids = {
        name: swarm.until(
            name, lambda s: s.state == "training" and s.exchanges_done >= 1, PATIENCE_S
        ).pid
        for name in "bc"
    }
    well = swarm.until("a", lambda s: len(s.partners) == 2, PATIENCE_S)
    assert lost(well) is None

    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
    alone = swarm.until("a", lambda s: said(s).startswith("2 of 2 "), PATIENCE_S)
    assert alone.health == "degraded"
    reason = lost(alone)
    assert reason is not None
    assert reason.text.startswith("2 of 2 known partners are gone: ")
    assert reason.text.count("(for ") == 2, "each with how long it is gone"
    assert reason.remedy == CONDITIONS["partners-lost"].remedy
    code, text = printed(swarm.home("a").path)
    assert code == ExitCode.DEGRADED
    assert "2 of 2 known partners are gone" in text
    assert "forgotten after a day" in text, "its remedy"

    for name in "bc":
        swarm.start(name, "--bootstrap", swarm.seed, "--listen", LOOPBACK, "--shard",
                    swarm.shard(name), **slow)  # fmt: skip
    swarm.until("a", lambda s: not said(s).startswith("2 of 2 "), PATIENCE_S)  # one is back
    swarm.until("a", lambda s: not said(s), PATIENCE_S)
    assert "known partners are gone" not in printed(swarm.home("a").path)[1]
