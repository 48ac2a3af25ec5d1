"""The trainer is restarted when it dies, and not when it says why it can't go on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from xpeer.errors import (
    ConfigError,
    DivergedError,
    ExitCode,
    LedgerError,
    LocalError,
    LocalTimeoutError,
    PeerError,
    Reason,
    TrainerError,
)
from xpeer.trainer.answers import error_of, failure_of
from xpeer.trainer.ended import Ended, TrainerKilledError
from xpeer.trainer.setup import TrainerSetup
from xpeer_daemon import supervisor as supervisor_module
from xpeer_daemon.supervisor import Supervisor


class FakeTrainer:
    def __init__(self) -> None:
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.crash: LocalError | None = None
        self.resumed_step: int | None = None
        self.ended: Ended | None = None

    def die(self, crash: LocalError | None = None, by_us: bool = True) -> None:
        self.crash = crash
        self.ended = Ended(-9, by_us=by_us)
        self.exited.set_result(-9)

    async def checkpoint(self) -> str:
        return "path"

    async def kill(self) -> int:
        if not self.exited.done():
            self.die()
        return -9

    async def stop(self, patience_s: float) -> int:
        self.ended = Ended(0)
        self.exited.set_result(0)
        return 0


class Rig:
    def __init__(self) -> None:
        self.made: list[FakeTrainer] = []
        self.told: asyncio.Queue[Any] = asyncio.Queue()
        self.refuse = False
        self.full: list[LocalError] = []
        self.setups: list[TrainerSetup] = []
        self.supervisor = Supervisor(
            lambda: TrainerSetup(manifest_path="", swarm_id="", home="", peer_id=""),
            self.start,
        )

    async def start(self, setup: TrainerSetup) -> Any:
        self.setups.append(setup)
        if self.refuse:
            raise TrainerError("no memory")
        if self.full:
            raise self.full.pop()
        self.made.append(FakeTrainer())
        return self.made[-1]

    async def run(self) -> asyncio.Task[None]:
        await self.supervisor.first_start()
        return asyncio.create_task(self.supervisor.run(self.told.put))


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    monkeypatch.setattr(supervisor_module, "FIRST_DELAY_S", 0.0)
    return Rig()


async def test_a_dead_trainer_is_replaced_and_counted(rig: Rig):
    task = await rig.run()
    rig.made[0].die()
    assert await rig.told.get() is rig.made[1]
    assert (rig.supervisor.restarts, rig.supervisor.down_reason) == (1, "")
    task.cancel()


async def test_a_wrong_setting_is_the_nodes_error(rig: Rig):
    task = await rig.run()
    rig.made[0].die(ConfigError("data.shard: no text"))
    with pytest.raises(ConfigError, match="no text"):
        await task
    assert len(rig.made) == 1


async def test_training_that_diverges_from_one_checkpoint_twice_ends_the_node(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    """However long that takes: a restart goes on from there again."""
    monkeypatch.setattr(supervisor_module, "QUIET_S", 0.0)
    diverged = error_of(failure_of(DivergedError("the loss is nan", "train slower")))
    assert isinstance(diverged, DivergedError)
    task = await rig.run()
    rig.made[0].die(diverged)
    for number, step in ((1, 100), (2, 200)):  # each had a newer checkpoint
        assert await rig.told.get() is rig.made[number]
        rig.made[number].resumed_step = step
        rig.made[number].die(diverged)
    assert await rig.told.get() is rig.made[3]
    rig.made[3].resumed_step = 200
    rig.made[3].die(diverged)
    with pytest.raises(DivergedError, match="nan") as e:
        await task
    assert e.value.exit_code == ExitCode.BAD_CONFIG
    assert len(rig.made) == 4


async def test_dying_again_and_again_ends_the_node(rig: Rig):
    task = await rig.run()
    rig.refuse = True
    rig.made[0].die()
    with pytest.raises(TrainerError, match="times in a row"):
        await task


async def test_what_a_trainer_says_at_its_end_comes_with_its_remedy(
    rig: Rig, caplog: pytest.LogCaptureFixture
):
    """Whoever reads the log has no other place to look."""
    task = await rig.run()
    rig.made[0].die(TrainerError("no memory", "lower training.micro_batch"))
    await rig.told.get()
    assert "no memory - lower training.micro_batch; starting it again" in caplog.text
    task.cancel()


async def test_a_trainer_after_one_that_was_killed_knows_it(
    rig: Rig, caplog: pytest.LogCaptureFixture
):
    """Also if it was killed in its start; and all those after it: memory is as short as before."""
    task = await rig.run()
    rig.made[0].die()
    await rig.told.get()
    assert [setup.was_killed for setup in rig.setups] == [False, False]
    rig.full.append(TrainerKilledError("the trainer was killed"))
    rig.made[1].die()
    await rig.told.get()
    assert [setup.was_killed for setup in rig.setups[2:]] == [False, True]
    rig.made[2].die(by_us=False)
    await rig.told.get()
    rig.made[3].die()
    await rig.told.get()
    assert [setup.was_killed for setup in rig.setups[4:]] == [True, True]
    assert "was killed by SIGKILL, which this node did not send" in caplog.text
    task.cancel()


async def test_one_death_is_enough_to_know(rig: Rig):
    task = await rig.run()
    rig.made[0].die(by_us=False)
    await rig.told.get()
    assert [setup.was_killed for setup in rig.setups] == [False, True]
    task.cancel()


async def test_a_ledger_that_cannot_be_written_is_waited_for(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(supervisor_module, "LONGEST_DELAY_S", 0.0)
    full: LocalError = LedgerError("privacy ledger: database or disk is full")
    task = await rig.run()
    rig.full = [full] * 3 * supervisor_module.MAX_QUICK_DEATHS
    rig.made[0].die(full)
    told = asyncio.ensure_future(rig.told.get())
    await asyncio.wait({task, told}, return_when=asyncio.FIRST_COMPLETED)
    assert not task.done(), "the node ended"
    assert told.result() is rig.made[1]
    assert rig.supervisor.restarts == 1
    task.cancel()


async def test_a_renewal_is_no_death(rig: Rig):
    task = await rig.run()
    await rig.supervisor.renew(1.0)
    assert await rig.told.get() is rig.made[1]
    assert rig.supervisor.restarts == 0
    task.cancel()


async def test_a_trainer_that_cannot_save_is_not_renewed(rig: Rig):
    task = await rig.run()
    await asyncio.sleep(0)

    async def full() -> str:
        raise LocalError("disk full")

    rig.made[0].checkpoint = full  # type: ignore[method-assign]
    await rig.supervisor.renew(1.0)
    assert not rig.made[0].exited.done()
    assert len(rig.made) == 1
    task.cancel()


async def test_a_trainer_that_awaits_its_parameters_is_renewed_without_a_save(rig: Rig):
    task = await rig.run()
    await asyncio.sleep(0)

    async def awaiting() -> str:
        raise PeerError(Reason.NOT_READY)

    rig.made[0].checkpoint = awaiting  # type: ignore[method-assign]
    await rig.supervisor.renew(1.0)
    assert await rig.told.get() is rig.made[1]
    task.cancel()


async def test_a_renewal_waits_until_the_trainer_is_watched(rig: Rig):
    """The text came back while the node still started, or while a trainer was told what to do."""
    await rig.supervisor.first_start()
    await rig.supervisor.renew(1.0)
    assert not rig.made[0].exited.done()

    async def told(trainer: Any) -> None:
        if trainer is rig.made[1]:
            await rig.supervisor.renew(1.0)
            assert not trainer.exited.done()
        await rig.told.put(trainer)

    task = asyncio.create_task(rig.supervisor.run(told))
    assert [await rig.told.get() for _ in range(2)] == rig.made[1:]
    assert rig.supervisor.restarts == 0
    assert id(rig.supervisor.trainer) == id(rig.made[2])
    task.cancel()


@pytest.mark.parametrize("dies", [True, False])
@pytest.mark.parametrize("renewed", [True, False])
async def test_a_trainer_that_fails_while_it_is_told_is_replaced(
    rig: Rig, dies: bool, renewed: bool
):
    """It died, or did not answer in time."""

    async def told(trainer: Any) -> None:
        if trainer is rig.made[1]:
            if dies:
                trainer.die()
            raise TrainerError("it ended") if dies else LocalTimeoutError("no answer")
        await rig.told.put(trainer)

    await rig.supervisor.first_start()
    task = asyncio.create_task(rig.supervisor.run(told))
    await asyncio.sleep(0)
    if renewed:
        await rig.supervisor.renew(1.0)
    else:
        rig.made[0].die()
    assert await rig.told.get() is rig.made[2]
    assert rig.made[1].exited.done()
    task.cancel()
