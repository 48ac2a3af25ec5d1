"""Real trainer processes: what crosses to them, and how they end."""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import signal
import sqlite3
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import pytest_asyncio
import torch
import uvloop

from tests.unit.training.homes import make_homes
from xpeer.errors import ConfigError, LocalError, PeerError, Reason, TrainerError
from xpeer.forms import Form
from xpeer.mixing.cut import padded
from xpeer.mixing.fragments import Fragments
from xpeer.trainer.answers import Snapshotted
from xpeer.trainer.build import assemble
from xpeer.trainer.child import Event
from xpeer.trainer.client import Progressed, Saved, SaveFailed, TrainerProcess
from xpeer.trainer.commands import Drop, Snapshot
from xpeer.trainer.setup import TrainerSetup
from xpeer.training import checkpoint
from xpeer.training.checkpoint_files import step_of
from xpeer.update import CompressedUpdate, PeerUpdate
from xpeer.wire.codec import decode, encode

module_loop = pytest.mark.asyncio(loop_scope="module")


class Watch:
    """Collects a trainer's events and lets a test wait for one."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._news = asyncio.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        self._news.set()

    async def until(self, wanted: Callable[[Event], bool]) -> Event:
        seen = 0
        while True:
            while seen < len(self.events):
                if wanted(self.events[seen]):
                    return self.events[seen]
                seen += 1
            self._news.clear()
            await self._news.wait()

    async def step(self, step: int) -> None:
        await self.until(lambda e: isinstance(e, Progressed) and e.progress.step >= step)

    async def state(self, state: str) -> Progressed:
        event = await self.until(lambda e: isinstance(e, Progressed) and e.state == state)
        assert isinstance(event, Progressed)
        return event


def with_config(setup: TrainerSetup, section: str, **changes: Any) -> TrainerSetup:
    part = msgspec.structs.replace(getattr(setup.config, section), **changes)
    config = msgspec.structs.replace(setup.config, **{section: part})
    return msgspec.structs.replace(setup, config=config)


def from_peer(update: CompressedUpdate, **changes: Any) -> PeerUpdate:
    fields = {"payload": update.payload, "form": update.form}
    return PeerUpdate(**{**fields, **changes}, peer_id="peer")


def empty_of(form: Form) -> PeerUpdate:
    return PeerUpdate(bytes(form.num_bytes), form, peer_id="peer")


def values_to_bytes(values: torch.Tensor) -> bytes:
    return values.numpy().astype("<f4").tobytes()


def values_of(payload: bytes | memoryview) -> np.ndarray:
    return np.frombuffer(payload, dtype="<f4").astype(np.float64)


@pytest.fixture(scope="module")
def setups(tmp_path_factory: pytest.TempPathFactory) -> list[TrainerSetup]:
    return make_homes(tmp_path_factory.mktemp("pair"), 2, changes=("end.steps=1000000",))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(setups: list[TrainerSetup]):
    """Two trainers of one swarm that train until the module's tests are done.

    Both have trained enough to know how far that moves them: one loads seconds after the other.
    """
    watches = Watch(), Watch()
    starts = (TrainerProcess.start(s, w) for s, w in zip(setups, watches, strict=True))
    a, b = await asyncio.gather(*starts)
    await asyncio.gather(*(watch.step(30) for watch in watches))
    yield a, b
    await asyncio.gather(a.kill(), b.kill())


Pair = tuple[TrainerProcess, TrainerProcess]


async def saved_by(*trainers: TrainerProcess) -> list[checkpoint.Bundle]:
    return [checkpoint.load(Path(await trainer.checkpoint())) for trainer in trainers]


async def parameters_of(*trainers: TrainerProcess) -> list[np.ndarray]:
    """Their own, as checkpoints hold them."""
    return [saved.flat.numpy() for saved in await saved_by(*trainers)]


def values_sent(update: CompressedUpdate) -> torch.Tensor:
    return decode(update.form, bytes(update.payload))


def relative_distances(x: torch.Tensor, y: torch.Tensor) -> list[float]:
    """As each of the two should find it."""
    return [float((x - y).norm() / own.norm()) for own in (x, y)]


@module_loop
async def test_an_exchange_between_two_trainers_keeps_the_sum(pair: Pair) -> None:
    a, b = pair
    await asyncio.gather(a.run("pause"), b.run("pause"))
    saved = await saved_by(a, b)
    before = [each.flat.numpy() for each in saved]
    fragments = Fragments(a.num_params, a.facts.num_fragments)
    half_way = torch.zeros(padded(a.num_params))  # from what a sent to the mean with b's
    for fragment in range(a.facts.num_fragments):
        ours, theirs = await asyncio.gather(
            a.snapshot(fragment, fragment, averaging=False),
            b.snapshot(fragment, fragment, averaging=False),
        )
        assert ours.form.num_values == a.fragment_values(fragment, averaging=False)
        one, other = values_sent(ours), values_sent(theirs)
        expected = relative_distances(one, other)
        fragments.add_(half_way, fragment, other - one, 0.5)
        found = await asyncio.gather(
            a.verify(fragment, 1, from_peer(theirs)), b.verify(fragment, 1, from_peer(ours))
        )
        assert [each.distance for each in found] == pytest.approx(expected, rel=1e-4)
        await asyncio.gather(a.merge(fragment, {1: 0.5}), b.merge(fragment, {1: 0.5}))
    saved_after = await saved_by(a, b)
    assert [s.counters["step"] for s in saved_after] == [s.counters["step"] for s in saved]
    after = [each.flat.numpy() for each in saved_after]
    shift = half_way[: a.num_params].numpy()
    assert np.abs(after[0] - before[0] - shift).max() < 1e-6
    assert np.abs(after[1] - before[1] + shift).max() < 1e-6
    gaps = [one - other for one, other in (before, after)]
    rounding = 0.1  # of int8; what the gap is beyond that depends on the steps taken so far
    assert np.linalg.norm(gaps[1]) < 0.2 * np.linalg.norm(gaps[0]) + rounding
    assert (a.progress.merges, a.progress.merges_clipped, a.state) == (3, 0, "paused")
    shown = [values_of((await trainer.export_state()).state.payload) for trainer in (a, b)]
    for state, own, others in zip(shown, after, reversed(before), strict=True):
        assert np.allclose(state, (own + others) / 2, atol=0.01)  # what a joiner is given
    assert np.array_equal(after, await parameters_of(a, b))
    await asyncio.gather(a.run("train"), b.run("train"))


@module_loop
async def test_snapshots_and_merges_are_served_while_training(pair: Pair) -> None:
    a, b = pair
    ours, theirs = await asyncio.gather(
        a.snapshot(50, 0, averaging=False), b.snapshot(50, 0, averaging=False)
    )
    assert ours.stamp.mode == "off"
    await a.verify(50, 1, from_peer(theirs))
    await a.merge(50, {1: 0.5})
    b.drop(50)
    losses = await a.evaluate()
    assert losses.public > 0
    assert losses.validation is not None


@module_loop
async def test_payloads_that_are_wrong_are_refused(pair: Pair) -> None:
    a, _ = pair
    update = await a.snapshot(60, 1, averaging=False)
    n = update.form.num_values
    poisoned = bytearray(update.payload)
    poisoned[:2] = struct.pack("<e", float("nan"))
    wrong = [
        (from_peer(update, payload=bytes(poisoned)), Reason.NOT_FINITE),
        (from_peer(update, payload=update.payload[:-1]), Reason.MALFORMED),
        (from_peer(update, payload=bytes(10**6)), Reason.OVERSIZE),
        (empty_of(Form("float32", n)), Reason.OVERSIZE),
        (empty_of(Form("int4", n)), Reason.WRONG_CODEC),
        (empty_of(Form("int8", 7)), Reason.WRONG_MODEL),
    ]
    for bad, reason in wrong:
        with pytest.raises(PeerError) as error:
            await a.verify(60, 1, bad)
        assert error.value.reason == reason
    with pytest.raises(TrainerError, match="verified"):
        await a.merge(60, {1: 0.5})
    far = torch.full((n,), 1e4)
    assert (await a.verify(60, 1, from_peer(update, payload=encode("int8", far)))).distance > 1000
    clipped = a.progress.merges_clipped
    await a.merge(60, {1: 0.5})
    await a.evaluate()
    assert a.progress.merges_clipped == clipped + 1


@module_loop
async def test_dropped_exchanges_are_forgotten_even_before_their_snapshot(pair: Pair) -> None:
    a, _ = pair
    await a.snapshot(70, 0, averaging=False)
    a.drop(70)
    with pytest.raises(PeerError) as error:
        await a.merge(70, {1: 0.5})
    assert error.value.reason == Reason.CLOSED
    for exchange_id in range(100, 140):  # more than may be in flight
        taking = asyncio.ensure_future(
            a._child.ask(Snapshot(exchange_id, 0, False, exchange_id % 8), Snapshotted)
        )
        await asyncio.sleep(0)
        a._child.send(Drop(exchange_id))
        await asyncio.wait([taking])
        taking.exception()
    await a.snapshot(71, 0, averaging=False)
    a.drop(71)


@module_loop
async def test_a_state_crosses_unchanged_and_bad_ones_are_refused(
    pair: Pair, setups: list[TrainerSetup]
) -> None:
    a, b = pair
    given = (await a.export_state()).state
    assert len(given.payload) == 4 * b.num_params
    await b.run("mix")
    await b.checkpoint()
    saved, _ = checkpoint.load_latest(Path(setups[1].home) / "checkpoints")
    assert saved is not None
    payload = values_to_bytes(1.0001 * saved.flat)  # others than its own, and hardly worse
    before = (await b.evaluate()).public
    loss = await b.import_state(payload, given.step)
    taken = (await b.export_state()).state
    assert bytes(taken.payload) == payload
    assert taken.step == given.step
    assert loss == pytest.approx(before, rel=0.02)
    assert b.state == "mixing"
    nan = np.full(b.num_params, np.nan, dtype="<f4").tobytes()
    worse = values_to_bytes(3.0 * saved.flat)
    for wrong, reason in [
        (payload[:-4], Reason.WRONG_MODEL),
        (nan, Reason.NOT_FINITE),
        (worse, Reason.WORSE_THAN_OURS),
    ]:
        with pytest.raises(PeerError) as error:
            await b.import_state(wrong, 3)
        assert error.value.reason == reason
    assert bytes((await b.export_state()).state.payload) == payload
    await b.run("train")


@module_loop
async def test_a_checkpoint_is_written(pair: Pair) -> None:
    a, _ = pair
    assert Path(await a.checkpoint()).exists()


@module_loop
async def test_a_trainer_that_dies_fails_what_waits_and_goes_on_from_its_checkpoint(
    pair: Pair, setups: list[TrainerSetup]
) -> None:
    """Last of those that share the pair: it ends one."""
    _, b = pair
    await b.checkpoint()
    saved, _ = checkpoint.load_latest(Path(setups[1].home) / "checkpoints")
    assert saved is not None
    os.kill(b.pid, signal.SIGSTOP)
    waiting = [asyncio.ensure_future(b.snapshot(200 + i, 0, averaging=False)) for i in range(3)]
    await asyncio.sleep(0)
    os.kill(b.pid, signal.SIGKILL)
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(result, TrainerError) for result in results)
    assert await b.exited == -signal.SIGKILL
    with pytest.raises(TrainerError):
        await b.snapshot(300, 0, averaging=False)
    b.drop(300)
    watch = Watch()
    again = await TrainerProcess.start(msgspec.structs.replace(setups[1], mode="pause"), watch)
    try:
        assert again.resumed_step is not None
        assert again.epoch != b.epoch
        state = (await again.export_state()).state
        assert state.step == saved.counters["step"]
        assert bytes(state.payload) == saved.flat.numpy().tobytes()
        again_saved = checkpoint.load(Path(await again.checkpoint()))
        assert torch.equal(again_saved.exp_avg, saved.exp_avg)
        assert torch.equal(again_saved.exp_avg_sq, saved.exp_avg_sq)
        assert again_saved.optimiser_step == saved.optimiser_step
        await again.run("train")
        await watch.step(state.step + 1)
        assert await again.stop(30) == 0
    finally:
        await again.kill()


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
    with pytest.raises(TrainerError, match="ended with status 1"):
        await TrainerProcess.start(make_homes(tmp_path, 1)[0], Watch(), program="xpeer.nothing")


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
