"""When a node's run is over, and what it does then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from tests.unit.daemon.fakes import ALPHA, BETA, FakeNode, member
from xpeer.config import Daemon, NodeConfig
from xpeer.errors import ExitCode, LocalError, LocalTimeoutError
from xpeer.identity import PeerId
from xpeer.phase import Phase
from xpeer.status import Progress
from xpeer_daemon import run_end
from xpeer_daemon.closing import Closing
from xpeer_daemon.presence import ROSTER_EVERY_S
from xpeer_daemon.run_end import MIN_PATIENCE_S, RunEnd
from xpeer_daemon.store import Store

SOON_S = 2 * ROSTER_EVERY_S + 1


class Rig:
    def __init__(self, folder: Path, *members: str, config: NodeConfig | None = None) -> None:
        self.fake = FakeNode(*members, config=config)
        self.store = Store.open(folder / "state.sqlite")
        self.closing = Closing(1, 1)
        self.orders: list[str] = []
        self.fails = self.pauses = False
        trainer: Any = self.fake.trainer
        trainer.progress = Progress(step=7)
        trainer.run, trainer.evaluate, trainer.checkpoint = self._run, self._evaluate, self._save
        self.end = RunEnd(
            self.fake.node, self.fake.view, self.fake.supervisor, self.closing, self.store
        )

    async def _run(self, order: str) -> None:
        if self.fails:
            raise LocalTimeoutError("the trainer does not answer", "wait")
        self.orders.append(order)

    async def _evaluate(self) -> None:
        if self.pauses:
            await self.fake.node.pause()

    async def _save(self) -> str:
        return "path"

    async def look(self, after_s: float = SOON_S) -> Phase:
        self.fake.clock.now += after_s
        await self.end.look()
        return self.fake.node.phase


@pytest.fixture
def again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_end, "FINISH_AGAIN_S", 0.0)
    monkeypatch.setattr(run_end, "ANNOUNCE_EVERY_S", 0.0)


async def test_a_lone_node_finishes_and_tells_its_trainer(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    assert await rig.look() is Phase.TRAINING
    rig.fake.is_in("closing")
    assert await rig.look() is Phase.FINISHED
    assert rig.orders == ["mix"]
    assert [event.kind for event in rig.store.events()] == ["finished"]


async def test_it_waits_for_those_who_train_and_for_the_consolidation(tmp_path: Path) -> None:
    rig = Rig(tmp_path, ALPHA)
    rig.fake.is_in("closing")
    assert await rig.look() is Phase.CLOSING
    rig.fake.members[PeerId(ALPHA)] = member(ALPHA, "closing")
    assert await rig.look(0) is Phase.CLOSING
    rig.closing.merged(0, 1)
    assert await rig.look(0) is Phase.FINISHED


async def test_records_that_may_be_old_end_nothing(tmp_path: Path) -> None:
    rig = Rig(tmp_path, ALPHA)
    rig.fake.is_in("closing")
    rig.closing.merged(0, 1)
    rig.fake.members[PeerId(ALPHA)] = member(ALPHA, "closing")
    assert await rig.look(ROSTER_EVERY_S) is Phase.CLOSING
    assert await rig.look() is Phase.FINISHED


async def test_one_that_trains_for_ever_holds_up_nobody(tmp_path: Path) -> None:
    rig = Rig(tmp_path, ALPHA)
    rig.fake.is_in("budget-spent")
    assert await rig.look(MIN_PATIENCE_S) is Phase.BUDGET_SPENT
    assert await rig.look(2) is Phase.FINISHED


@pytest.mark.usefixtures("again_at_once")
async def test_a_node_that_can_not_save_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path)
    rig.fake.is_in("closing")

    async def full() -> str:
        raise LocalError("no space is left", "free some")

    with monkeypatch.context() as patch:
        patch.setattr(rig.fake.trainer, "checkpoint", full)
        assert await rig.look() is Phase.CLOSING
    rig.fails = True  # the trainer stopped answering
    assert await rig.look() is Phase.CLOSING
    rig.fails = False
    assert await rig.look() is Phase.FINISHED


async def test_one_that_is_paused_meanwhile_does_not_finish(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.fake.is_in("closing")
    rig.pauses = True
    assert await rig.look() is Phase.PAUSED
    assert await rig.look() is Phase.PAUSED
    rig.pauses = False
    await rig.fake.node.resume()
    assert await rig.look() is Phase.FINISHED


async def test_a_node_without_text_ends_when_all_others_have(tmp_path: Path) -> None:
    rig = Rig(tmp_path, ALPHA, BETA)
    trainer = rig.fake.trainer
    trainer.facts = structs.replace(trainer.facts, text_problem="it is not mounted")
    for phases, ends in [
        (("closing", "mixing"), False),
        ((), False),  # those who are away may come back
        (("closing", "finished"), True),
    ]:
        rig.fake.is_in("mixing")
        names = (ALPHA, BETA)[: len(phases)]
        rig.fake.members = {
            PeerId(p): member(p, phase) for p, phase in zip(names, phases, strict=True)
        }
        assert (await rig.look() is Phase.CLOSING) == ends
    rig.fake.is_in("mixing")
    trainer.facts = structs.replace(trainer.facts, text_problem="")
    assert await rig.look() is Phase.MIXING
    rig.fake.supervisor.trainer = None
    assert await rig.look() is Phase.MIXING


async def test_exit_on_budget_stops_with_its_code(tmp_path: Path) -> None:
    rig = Rig(tmp_path, ALPHA, config=NodeConfig(daemon=Daemon(exit_on_budget=True)))
    rig.fake.is_in("budget-spent")
    await rig.look()
    assert rig.end.exit_code == ExitCode.BUDGET_SPENT
    assert rig.fake.life.stop_wanted.is_set()
    assert not rig.fake.life.leaving


@pytest.mark.usefixtures("again_at_once")
async def test_exit_when_finished_leaves(tmp_path: Path) -> None:
    rig = Rig(tmp_path, config=NodeConfig(daemon=Daemon(exit_when_finished=True)))
    rig.fake.is_in("closing")
    assert await rig.look() is Phase.FINISHED
    assert (rig.fake.life.stop_wanted.is_set(), rig.fake.life.leaving) == (True, True)
