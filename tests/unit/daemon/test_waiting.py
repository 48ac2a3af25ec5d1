"""A trainer that dies while the node waits for members: it is noticed, and the node lives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.unit.daemon.fakes import ALPHA, MANIFEST, FakeNode, member
from xpeer import needs
from xpeer.config import NodeConfig, Training
from xpeer.errors import TrainerError
from xpeer.identity import PeerId
from xpeer.phase import Order, Phase
from xpeer.trainer.client import TrainerProcess
from xpeer.trainer.ended import Ended
from xpeer_daemon import service
from xpeer_daemon import supervisor as supervisor_module
from xpeer_daemon.supervisor import Supervisor


class FakeTrainer(TrainerProcess):
    """A process that a test ends.

    Args:
        resumed_step: of its checkpoint; None = it has no parameters yet.
    """

    def __init__(self, resumed_step: int | None) -> None:
        super().__init__(lambda _event: None)
        self.gone: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.orders: list[str] = []
        self.dies_when_told = False
        self._step = resumed_step

    @property
    def exited(self) -> Any:
        return self.gone

    @property
    def ended(self) -> Ended | None:
        return Ended(-9, by_us=True) if self.gone.done() else None

    @property
    def crash(self) -> Any:
        return None

    @property
    def resumed_step(self) -> int | None:
        return self._step

    async def run(self, mode: Order) -> None:
        if self.dies_when_told and not self.gone.done():
            self.gone.set_result(-9)
        if self.gone.done():
            raise TrainerError("the trainer is gone")
        self.orders.append(mode)

    async def kill(self) -> int:
        if not self.gone.done():
            self.gone.set_result(-9)
        return -9


class Rig:
    """`service.live` from the moment on when the first trainer holds the parameters."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, resumed_step: int | None) -> None:
        self.fake = fake = FakeNode(config=NodeConfig(training=Training(min_peers=1)))
        fake.is_in("joining")
        self.resumed_step = resumed_step
        self.made: list[FakeTrainer] = []
        self.held_again = asyncio.Event()
        self.may_hold = asyncio.Event()
        self.may_hold.set()
        self.dies_in_hold = False
        self.supervisor = Supervisor(cast(Any, dict), self.start)
        forever = asyncio.Event().wait
        self.member: Any = SimpleNamespace(
            view=fake.view,
            supervisor=self.supervisor,
            partners=fake.partners,
            manifest=SimpleNamespace(**vars(MANIFEST), shared_corpus=None),
            parameters=SimpleNamespace(
                hold=self.hold, hold_again=self.hold_again, catch_up_later=forever
            ),
            presence=SimpleNamespace(keep_announcing=forever, keep_refreshing=forever),
            closing=SimpleNamespace(begin=lambda: None),
            gossip=SimpleNamespace(run=forever),
            run_end=SimpleNamespace(watch=forever),
        )
        nothing: Any = None
        self.candidate: Any = SimpleNamespace(
            node=fake.node, home=nothing, config=fake.node.config, identity=nothing,
            store=SimpleNamespace(add_event=lambda *_: None),
        )  # fmt: skip

        async def admission() -> Any:
            return nothing

        async def served(*_: Any) -> None:
            return

        joiner = SimpleNamespace(Joiner=lambda *_: SimpleNamespace(admission=admission))
        for name, part in (
            ("joiner", joiner),
            ("build_member", lambda *_: self.member),
            ("serve", served),
            ("watch", SimpleNamespace(keep_watching=lambda *_: forever())),
            ("_feed_watchdog", lambda *_: forever()),
            ("PEERS_S", 0.0),
        ):
            monkeypatch.setattr(service, name, part)
        monkeypatch.setattr(needs, "require", lambda *_: None)
        monkeypatch.setattr(needs.Needs, "of", lambda *_: None)
        monkeypatch.setattr(fake.view.acquaintances, "keep_asking", lambda *_: forever())
        monkeypatch.setattr(supervisor_module, "FIRST_DELAY_S", 0.0)

    async def start(self, setup: Any) -> Any:
        self.made.append(FakeTrainer(self.resumed_step))
        return self.made[-1]

    async def hold(self, trainer: TrainerProcess) -> TrainerProcess:
        self.fake.life.enter(Phase.FETCHING)
        if self.dies_in_hold:
            self.made[0].gone.set_result(-9)
            raise TrainerError("the trainer is gone")
        return trainer

    async def hold_again(self, trainer: TrainerProcess) -> bool:
        if trainer.resumed_step is None:
            self.fake.life.enter(Phase.FETCHING)
        self.held_again.set()
        await self.may_hold.wait()
        return trainer.resumed_step is None

    @asynccontextmanager
    async def lives(self) -> AsyncIterator[None]:
        """The node's life; a test that waits for something fails if it ends."""
        self.living = asyncio.create_task(service.live(self.candidate))
        yield
        self.living.cancel()
        await asyncio.gather(self.living, return_exceptions=True)

    async def until(self, happened: Callable[[], bool]) -> None:
        while not happened():
            assert not self.living.done(), self.living.exception()
            await asyncio.sleep(0)

    async def until_in(self, phase: Phase) -> None:
        await self.until(lambda: self.fake.node.phase is phase)

    def partner_comes(self) -> None:
        self.fake.members[PeerId(ALPHA)] = member(ALPHA)


@pytest.mark.parametrize("resumed_step", [None, 0], ids=["without a checkpoint", "with one"])
async def test_one_that_dies_while_the_node_waits_is_started_again(
    monkeypatch: pytest.MonkeyPatch, resumed_step: int | None
) -> None:
    rig = Rig(monkeypatch, resumed_step)
    async with rig.lives():
        await rig.until_in(Phase.WAITING)
        rig.may_hold.clear()
        rig.made[0].gone.set_result(-9)
        rig.partner_comes()
        await rig.until(rig.held_again.is_set)  # it was seen, and another one was started
        assert rig.supervisor.restarts == 1
        for _ in range(20):  # while it gets its parameters, nobody begins with it
            await asyncio.sleep(0)
        assert rig.made[1].orders == []
        rig.may_hold.set()
        await rig.until_in(Phase.TRAINING)
        assert [trainer.orders for trainer in rig.made] == [[], ["train"]]


@pytest.mark.parametrize("resumed_step", [None, 0], ids=["without a checkpoint", "with one"])
async def test_one_that_dies_as_it_gets_its_first_parameters_is_started_again(
    monkeypatch: pytest.MonkeyPatch, resumed_step: int | None
) -> None:
    rig = Rig(monkeypatch, resumed_step)
    rig.dies_in_hold = True
    async with rig.lives():
        rig.partner_comes()
        await rig.until_in(Phase.TRAINING)
        assert rig.supervisor.restarts == 1
        assert [trainer.orders for trainer in rig.made] == [[], ["train"]]


async def test_while_there_is_none_status_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, 0)
    monkeypatch.setattr(supervisor_module, "FIRST_DELAY_S", 3600.0)
    async with rig.lives():
        await rig.until_in(Phase.WAITING)
        rig.partner_comes()
        rig.made[0].gone.set_result(-9)
        await rig.until(lambda: bool(rig.supervisor.down_reason))
        assert rig.fake.node.phase is Phase.WAITING
        assert "trainer-down" in rig.fake.codes


async def test_one_that_dies_as_it_is_told_to_begin_is_started_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(monkeypatch, 0)
    async with rig.lives():
        await rig.until_in(Phase.WAITING)
        rig.made[0].dies_when_told = True
        rig.partner_comes()
        await rig.until_in(Phase.TRAINING)
        assert [trainer.orders for trainer in rig.made] == [[], ["train"]]
