"""The order of things at a daemon's end."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.daemon.fakes import FakeNode
from tests.unit.test_founding import found
from xpeer import signals
from xpeer.config import Home, NodeConfig
from xpeer.errors import LedgerError
from xpeer.status import PrivacySpent, Progress
from xpeer.trainer.answers import Crashed, Progressed, failure_of
from xpeer_daemon import ending, joiner, service
from xpeer_daemon.member import Candidate, Options
from xpeer_daemon.store import Known, Store
from xpeer_daemon.trainer_events import TrainerEvents
from xpeer_daemon.windows import Windows


async def lives_offline(candidate: Candidate) -> None:
    """It reaches nobody; its trainer speaks once, in the middle of a window."""
    node = candidate.node
    assert node.certificate.role == "admin"
    node.follow_trainer("training", Progress(step=341, window=34), PrivacySpent(mode="off"))
    node.request_stop(leave=False)
    await asyncio.Event().wait()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    async def connect(*_: Any) -> Any:
        return SimpleNamespace(**vars(FakeNode().swarm), close=lambda: asyncio.sleep(0))

    monkeypatch.setattr(joiner, "connect", connect)
    monkeypatch.setattr(service, "live", lives_offline)
    monkeypatch.setattr(signals, "end_by", lambda loop, end: None)  # pytest keeps its own
    return found(tmp_path / "home")


async def test_a_stop_keeps_what_the_trainer_said_last(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    before = Store.open(home.state_db)
    before.keep_known(Known(Progress(step=330, window=33), PrivacySpent(mode="off"), 1e9))
    before.close()
    assert await service.run(home, NodeConfig(), Options()) == 0
    after = Store.open(home.state_db)
    known = after.last_known()
    after.close()
    assert known is not None
    assert known.progress.step == 341, "a status after the next start shows an older step"
    assert "can't be written" not in caplog.text


@pytest.mark.parametrize("followed", [True, False])
async def test_a_node_that_a_client_stops_stays_until_that_has_heard_of_its_end(
    monkeypatch: pytest.MonkeyPatch, followed: bool
) -> None:
    """However soon it is over. Whom systemd stops waits for nobody."""
    monkeypatch.setattr(ending, "TELL_S", 1e6)
    node = FakeNode().node
    node.request_stop(leave=False, followed=followed)
    leaving = asyncio.create_task(node.ends.over())
    for _ in range(10):
        await asyncio.sleep(0)
    assert leaving.done() is not followed
    assert (await node.end()).over
    await leaving


def test_a_charge_that_cannot_be_written_is_named_until_a_step_is_charged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeNode()
    says_so = TrainerEvents(
        fake.node, Windows(tmp_path / "losses.csv", fake.node, lambda _: None), lambda: None
    )
    full = LedgerError("privacy ledger x can't be used: database or disk is full", "free some")

    def says(step: int) -> None:
        progress = Progress(step=step, tokens=10 * step)
        says_so(Progressed("training", progress, 0))

    says(341)
    for _ in range(2):  # the second time it can't even start
        says_so(Crashed(failure_of(full)))
        fake.clock.now += 65
    assert caplog.messages.count(f"trainer: {full.problem} - free some") == 2
    says(340)  # of an older checkpoint: it has started, and has not charged yet
    (reason,) = [r for r in fake.node.health.reasons() if r.code == "ledger-failing"]
    assert reason.severity == "down"
    assert reason.text == (
        "no privacy charge can be written for 2m 10s (2 tried), so no step is taken: "
        "privacy ledger x can't be used: database or disk is full"
    )
    says(341)
    assert "ledger-failing" not in {r.code for r in fake.node.health.reasons()}
