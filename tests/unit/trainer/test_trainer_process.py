"""Real trainer processes: what crosses to them."""

from __future__ import annotations

import asyncio
import os
import signal
import struct
from pathlib import Path

import msgspec
import numpy as np
import pytest
import pytest_asyncio
import torch

from tests.unit.trainer.processes import (
    Watch,
    empty_of,
    from_peer,
    parameters_of,
    relative_distances,
    saved_by,
    values_of,
    values_sent,
    values_to_bytes,
)
from tests.unit.training.homes import make_homes
from xpeer.errors import PeerError, Reason, TrainerError
from xpeer.forms import Form
from xpeer.mixing.cut import padded
from xpeer.mixing.fragments import Fragments
from xpeer.trainer.answers import Snapshotted
from xpeer.trainer.client import TrainerProcess
from xpeer.trainer.commands import Drop, Snapshot
from xpeer.trainer.setup import TrainerSetup
from xpeer.training import checkpoint
from xpeer.wire.codec import encode

module_loop = pytest.mark.asyncio(loop_scope="module")


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
    assert taken.step == max(given.step, saved.step)
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
