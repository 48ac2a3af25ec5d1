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
from xpeer.status import PrivacySpent, Progress
from xpeer_daemon.joiner import Joiner
from xpeer_daemon.service import Service
from xpeer_daemon.store import Known, Store


class Offline(Service):
    """It reaches nobody; its trainer speaks once, in the middle of a window."""

    async def _live(self) -> None:
        node = self._node
        assert node.certificate == self._certificate  # else nobody hears of its end
        node.follow_trainer("training", Progress(step=341, window=34), PrivacySpent(mode="off"))
        node.request_stop(leave=False)
        await asyncio.Event().wait()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    async def connect(joiner: Joiner) -> Any:
        return SimpleNamespace(**vars(FakeNode().swarm), close=lambda: asyncio.sleep(0))

    monkeypatch.setattr(Joiner, "connect", connect)
    monkeypatch.setattr(signals, "end_by", lambda loop, end: None)  # pytest keeps its own
    return found(tmp_path / "home")


async def test_a_stop_keeps_what_the_trainer_said_last(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    config = NodeConfig()
    before = Store.open(home.state_db)
    before.keep_known(Known(Progress(step=330, window=33), PrivacySpent(mode="off"), 1e9))
    before.close()
    assert await Offline(home, config).main() == 0
    after = Store.open(home.state_db)
    known = after.last_known()
    after.close()
    assert known is not None
    assert known.progress.step == 341, "a status after the next start shows an older step"
    assert "can't be written" not in caplog.text
