"""Real trainer processes: how they end."""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import signal
import sqlite3
import sys
from pathlib import Path

import msgspec
import pytest
import uvloop

from tests.unit.trainer.processes import Watch, with_config
from tests.unit.training.homes import make_homes
from xpeer.errors import ConfigError, LocalError, PeerError, Reason, TrainerError
from xpeer.trainer.build import assemble
from xpeer.trainer.client import Progressed, Saved, SaveFailed, TrainerProcess
from xpeer.training.checkpoint_files import step_of


@pytest.mark.timeout(180)  # two starts and some sixty private steps, on a busy machine
async def test_a_budget_ends_is_never_refunded_and_mixing_goes_on(tmp_path: Path) -> None:
    """Private steps end with the budget, over restarts; snapshots go on."""
    setup = make_homes(
        tmp_path, 1, privacy="record",
        changes=("privacy.noise_multiplier=1.0", "privacy.epsilon=2.0", "privacy.delta=1e-5"),
    )[0]  # fmt: skip
    watch = Watch()
    trainer = await TrainerProcess.start(setup, watch)
    await watch.step(2)
    saved = step_of(Path(await trainer.checkpoint()))
    await watch.step(saved + 1)  # which the kill forfeits
    charged = trainer.ledger_counter
    assert charged >= 1
    await trainer.kill()
    watch = Watch()
    trainer = await TrainerProcess.start(setup, watch)
    try:
        assert trainer.resumed_step is not None
        assert trainer.ledger_counter >= charged
        event = await watch.state("budget-spent")
        assert event.progress.step > 2
        spent = await watch.until(
            lambda e: isinstance(e, Progressed) and e.privacy is not None
            and e.privacy.steps_left == 0
        )  # fmt: skip
        assert isinstance(spent, Progressed)
        assert spent.privacy is not None
        assert spent.privacy.epsilon_spent <= 2.0
        # what the kill forfeited stays charged
        forfeited = spent.privacy.steps_forfeited
        assert spent.privacy.steps_charged == event.progress.step + forfeited
        update = await trainer.snapshot(1, 0, averaging=False)
        assert update.stamp.steps_charged == spent.privacy.steps_charged
        assert await trainer.stop(30) == 0
    finally:
        await trainer.kill()
    with sqlite3.connect(Path(setup.home) / "ledger.sqlite") as ledger:
        ledger.execute("UPDATE head SET ledger_id = 'another'")
    with pytest.raises(LocalError, match="ledger"):
        assemble(setup)


async def test_stopping_saves_and_ends_while_resting(tmp_path: Path) -> None:
    """At a throttle of 1e-4 a step is followed by minutes of rest."""
    setup = with_config(make_homes(tmp_path, 1)[0], "training", throttle=1e-4)
    watch = Watch()
    trainer = await TrainerProcess.start(setup, watch)
    await watch.step(1)
    assert await trainer.stop(30) == 0
    saved = next(event for event in watch.events if isinstance(event, Saved))
    assert Path(saved.path).exists()


@pytest.mark.timeout(240)  # it is tried again after 30 s
async def test_a_checkpoint_that_cannot_be_written_is_told_and_training_goes_on(
    tmp_path: Path,
) -> None:
    endless = make_homes(tmp_path, 1, changes=("end.steps=1000000",))[0]
    watch = Watch()
    trainer = await TrainerProcess.start(with_config(endless, "checkpoint", every_s=0.01), watch)
    folder = Path(endless.home) / "checkpoints"
    await watch.until(lambda event: isinstance(event, Saved))
    aside = folder.rename(tmp_path / "aside")
    while True:  # a checkpoint that is being written makes the folder anew
        try:
            folder.touch(exist_ok=False)
            break
        except FileExistsError:
            shutil.rmtree(folder)
    failed = await watch.until(lambda event: isinstance(event, SaveFailed))
    assert isinstance(failed, SaveFailed)
    assert "checkpoint" in failed.problem
    folder.unlink()
    aside.rename(folder)
    watch.events.clear()
    saved = await watch.until(lambda event: isinstance(event, Saved))
    assert isinstance(saved, Saved)
    assert saved.step > failed.step
    assert await trainer.stop(30) == 0


async def test_a_checkpoint_that_was_asked_for_and_fails_is_told_like_any_other(tmp_path: Path):
    setup = make_homes(tmp_path, 1)[0]
    watch = Watch()
    trainer = await TrainerProcess.start(msgspec.structs.replace(setup, mode="pause"), watch)
    (Path(setup.home) / "checkpoints").touch()
    with pytest.raises(LocalError, match="checkpoints"):
        await trainer.checkpoint()
    failed = await watch.until(lambda event: isinstance(event, SaveFailed))
    assert isinstance(failed, SaveFailed)
    assert "checkpoint" in failed.problem
    await trainer.kill()


async def test_the_end_of_the_run_is_told_and_a_joiner_waits_for_its_parameters(
    tmp_path: Path,
) -> None:
    founder, joiner = make_homes(tmp_path, 2, changes=("end.steps=6",))
    watch = Watch()
    a, b = await asyncio.gather(
        TrainerProcess.start(founder, watch),
        TrainerProcess.start(msgspec.structs.replace(joiner, initial="awaited"), Watch()),
    )
    try:
        assert (await watch.state("closing")).progress.step == 6
        assert b.state == "mixing"
        with pytest.raises(PeerError) as error:
            await b.snapshot(1, 0, averaging=False)
        assert error.value.reason == Reason.NOT_READY
        state = (await a.export_state()).state
        await b.import_state(state.payload, 4)
        await b.snapshot(1, 0, averaging=False)
        await b.run("mix")
        assert b.progress.step >= 4
        await b._child._channel.close()  # the end of the socket is the end of the trainer
        assert await b.exited != 0
    finally:
        await asyncio.gather(a.kill(), b.kill())


async def test_a_wrong_setting_crosses_with_its_remedy(tmp_path: Path) -> None:
    setup = with_config(make_homes(tmp_path, 1)[0], "data", shard=[str(tmp_path / "nothing")])
    with pytest.raises(ConfigError, match="nothing") as error:
        await TrainerProcess.start(setup, Watch())
    assert error.value.remedy
    assert error.value.exit_code == 8


async def test_it_runs_the_program_that_it_is_told_to(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="the trainer exited with 1"):
        await TrainerProcess.start(make_homes(tmp_path, 1)[0], Watch(), program="xpeer.nothing")


async def test_a_kill_from_outside_is_told_from_ours(tmp_path: Path) -> None:
    """In the error of those who wait for an answer, too."""
    setup = make_homes(tmp_path, 1)[0]
    ours = await TrainerProcess.start(setup, Watch())
    await ours.kill()
    assert str(ours.ended) == "was ended by SIGKILL"
    killed = await TrainerProcess.start(setup, Watch())
    os.kill(killed.pid, signal.SIGKILL)
    await killed.exited
    assert killed.ended is not None
    assert killed.ended.was_killed
    with pytest.raises(TrainerError, match="which this node did not send") as error:
        await killed.checkpoint()
    assert "micro_batch" in error.value.remedy


PARENT = """
import asyncio, sys, msgspec
from xpeer.trainer.client import TrainerProcess
from xpeer.trainer.setup import TrainerSetup

async def main():
    setup = msgspec.json.decode(sys.stdin.buffer.read(), type=TrainerSetup)
    trainer = await TrainerProcess.start(setup, lambda event: None)
    print(trainer.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_a_daemon_that_is_killed_leaves_no_orphan(tmp_path: Path) -> None:
    setup = make_homes(tmp_path, 1)[0]
    daemon = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PARENT),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert daemon.stdin is not None
    assert daemon.stdout is not None
    daemon.stdin.write(msgspec.json.encode(setup))
    daemon.stdin.close()
    pidfd = os.pidfd_open(int(await daemon.stdout.readline()))
    try:
        daemon.kill()
        await daemon.wait()
        readable: list[int]
        readable, _, _ = await asyncio.to_thread(select.select, [pidfd], [], [], 30)
        assert readable == [pidfd]
    finally:
        os.close(pidfd)


def test_a_loop_that_is_closed_leaves_no_trainer_and_does_not_hang(tmp_path: Path) -> None:
    """Under the daemon's loop, when its main task fails: everything is cancelled at once."""
    setup = make_homes(tmp_path, 1)[0]
    started: list[TrainerProcess] = []

    async def scenario() -> None:
        watch = Watch()
        trainer = await TrainerProcess.start(setup, watch)
        started.append(trainer)
        await watch.step(1)
        await trainer.snapshot(1, 0, averaging=False)
        raise ZeroDivisionError

    with (
        pytest.raises(ZeroDivisionError),
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(scenario())
    assert started[0].exited.result() == -signal.SIGKILL
