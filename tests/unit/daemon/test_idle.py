"""A node whose text is not trained on says so, and what a refused swarm leaves behind."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.daemon.fakes import FakeNode
from tests.unit.training.homes import make_homes
from xpeer import founding
from xpeer.config import Data, Home, Network, NodeConfig
from xpeer.errors import ConfigError, LocalError
from xpeer.identity import Identity
from xpeer.manifest.signed import SignedManifest
from xpeer.phase import Phase
from xpeer.status import PrivacySpent, Progress
from xpeer_daemon import start
from xpeer_daemon.joiner import Joiner
from xpeer_daemon.life import Life
from xpeer_daemon.lock import HomeLock


@pytest.fixture
def fake() -> FakeNode:
    found = FakeNode()
    found.trainer.progress = Progress(step=600, tokens=0)
    return found


def test_a_run_that_had_ended_before_we_came(fake: FakeNode) -> None:
    fake.node.follow_trainer("closing", Progress(step=600))
    fake.life.enter(Phase.FINISHED)
    assert "run-had-ended" in fake.codes
    assert fake.node.status().health == "degraded"
    trainer = fake.trainer
    for used in (Progress(step=600, tokens=1), None):
        trainer.progress = used or Progress(step=600, tokens=0)
        if used is None:  # its checkpoint was lost, its charges were not
            trainer.privacy = PrivacySpent(steps_charged=5)
        assert "run-had-ended" not in fake.codes


def test_a_budget_that_ended_before_the_run_is_told_to_the_end(fake: FakeNode) -> None:
    fake.node.follow_trainer("budget-spent", Progress(step=2))
    for phase in (Phase.BUDGET_SPENT, Phase.FINISHED):
        fake.life.enter(phase)
        assert "budget-spent" in fake.codes
    fake.is_in("training")
    fake.node.follow_trainer("training", Progress(step=3))  # with other text
    assert "budget-spent" not in fake.codes


async def test_a_swarm_that_is_refused_leaves_the_home_free_for_another(tmp_path: Path) -> None:
    setup = make_homes(tmp_path, 1, privacy="off")[0]
    signed = SignedManifest.load(Path(setup.manifest_path))
    home = Home(tmp_path / "joiner")
    home.path.mkdir()
    home.credential.write_bytes(b"of the refused swarm")
    home.seeds.write_bytes(b"[]")
    config = NodeConfig(data=Data(privacy="record"))
    swarm: Any = SimpleNamespace(membership=SimpleNamespace(swarm_id=setup.swarm_id))
    joiner = Joiner(home, config, Identity.generate(), swarm, Life(lambda: 0.0))

    async def asked(swarm_id: str) -> tuple[SignedManifest, bytes]:
        return signed, bytes(32)

    joiner._ask_members = asked  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"data\.privacy = record"):
        await joiner.admission()
    assert list(home.path.iterdir()) == []
    founding.forget_join(home)  # again: nothing to do
    for more in (home.admin_key, home.ledger_db, home.swarm_key):  # a home that was more than that
        home.credential.write_bytes(b"")
        more.write_bytes(b"")
        founding.forget_join(home)
        assert home.credential.exists()
        more.unlink()


def test_a_second_start_names_the_first_before_its_port(tmp_path: Path) -> None:
    home = Home(tmp_path)
    taken = NodeConfig(network=Network(listen=["/ip4/127.0.0.1/tcp/1"]))
    with HomeLock.acquire(home), pytest.raises(LocalError, match=f"daemon .pid {os.getpid()}."):
        start.run(home, taken)
