"""Meetings of the training loop: snapshots, payloads, merges, and parameters of a donor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.unit.training.clocks import Clock
from tests.unit.training.loops import (
    NUM_PARAMS,
    merge,
    swap,
    taken,
    trainer_with,
    unbounded,
    verify,
)
from xpeer.errors import LocalError, PeerError, Reason, TrainerError
from xpeer.forms import Codec, Form
from xpeer.manifest import End, Optimiser
from xpeer.manifest.round import Round
from xpeer.mixing.in_flight import MAX_IN_FLIGHT
from xpeer.training.schedule import learning_rate
from xpeer.update import PeerUpdate


def test_merges_of_both_sides_keep_the_sum_while_training_goes_on() -> None:
    a, b = trainer_with(seed=1), trainer_with(seed=2)
    a.exchanges._limits[a.exchanges.rule][0].accepted(1e6)
    for exchange_id in range(6):
        fragment = exchange_id % 3
        swap(a, b, exchange_id, fragment)
        a.run(steps=2)
        total = a.parameters.read() + b.parameters.read()
        merge(a, exchange_id)
        merge(b, exchange_id)
        if a.counters.merges_clipped == b.counters.merges_clipped == 0:
            assert torch.allclose(a.parameters.read() + b.parameters.read(), total, atol=1e-5)
    assert a.progress().merges == 6
    assert a.progress().steps_late == 2.0
    assert b.progress().steps_late == 0.0


@pytest.mark.parametrize(
    ("codec", "left"),  # of a distance of 11: what the codec leaves
    [("int8", 0.3), ("bfloat16", 0.2), ("int4", 7.0)],
)
def test_mixing_alone_brings_peers_together(codec: Codec, left: float) -> None:
    round_ = Round(window_steps=4, fragments=3, codec=codec)
    a, b = trainer_with(seed=1, round=round_), trainer_with(seed=2, round=round_)
    # of one start: what is as far away as another random vector is clipped
    b.parameters.write(torch.lerp(a.parameters.read(), b.parameters.read(), 0.3))
    for exchange_id in range(30):
        swap(a, b, exchange_id, exchange_id % 3)
        merge(a, exchange_id)
        merge(b, exchange_id)
    assert float((a.parameters.read() - b.parameters.read()).norm()) < left
    distance = a.progress().consensus_distance
    assert distance is not None
    assert distance < 0.9  # smoothed


def test_a_dropped_exchange_is_not_merged_and_refused_afterwards() -> None:
    a, b = trainer_with(seed=1), trainer_with(seed=2)
    swap(a, b, 1, 0)
    before = a.parameters.read()
    a.exchanges.resolve(1, {1: 0.5})
    a.exchanges.drop(1)
    a.merge(1)
    assert torch.equal(a.parameters.read(), before)
    assert a.progress().merges == 0
    with pytest.raises(PeerError) as error:
        a.exchanges.resolve(1, {1: 0.5})
    assert error.value.reason == Reason.CLOSED
    a.exchanges.drop(99)


def test_in_flight_is_bounded_and_out_of_order_is_refused() -> None:
    trainer = trainer_with()
    for fragment in range(3):
        trainer.snapshot(fragment, fragment, averaging=False)
    with pytest.raises(PeerError) as error:
        trainer.snapshot(MAX_IN_FLIGHT, 0, averaging=False)
    assert error.value.reason == Reason.BUSY
    with pytest.raises(TrainerError, match="has its snapshot"):
        trainer.snapshot(0, 0, averaging=False)
    with pytest.raises(TrainerError, match="is certified, not sent"):
        trainer.exchanges.resolve(0, {1: 0.5})
    with pytest.raises(LocalError, match="fragment 3"):
        trainer.snapshot(0, 3, averaging=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"payload": b"\0"}, Reason.MALFORMED),
        ({"payload": b"\0" * 10_000}, Reason.OVERSIZE),
        ({"form": Form("float32", 256)}, Reason.WRONG_CODEC),
        ({"form": Form("int8", 10**12)}, Reason.WRONG_MODEL),
        ({"payload": b"\xff" * (2 * 2 + 256)}, Reason.NOT_FINITE),
    ],
)
def test_bad_payloads_are_refused(change: dict[str, Any], reason: str) -> None:
    trainer = trainer_with()
    update = taken(trainer, 1, 0)
    with pytest.raises(PeerError) as error:
        verify(trainer, 1, replace(update, **change))
    assert error.value.reason == reason


def test_a_joiner_waits_then_starts_afresh_at_its_donors_step() -> None:
    trainer = trainer_with(
        awaiting=True, optimiser=Optimiser(learning_rate=1e-2, warmup_steps=100, schedule="linear"),
        end=End(steps=1000),
    )  # fmt: skip
    trainer.run(steps=5)
    assert (trainer.counters.step, trainer.state) == (0, "mixing")
    with pytest.raises(PeerError) as error:
        trainer.snapshot(1, 0, averaging=False)
    assert error.value.reason == Reason.NOT_READY
    donor = torch.full((NUM_PARAMS,), 0.25)
    before, after = trainer.replace(donor, step=500)
    assert (trainer.counters.step, after) == (500, 0.25)
    assert before != after
    full = 1e-2 * (0.1 + 0.9 * 0.5)
    assert learning_rate(trainer.counters, trainer.manifest) == pytest.approx(full / 20)
    trainer.run(steps=5)
    assert trainer.counters.step == 505


def test_a_trainer_with_parameters_is_never_set_back() -> None:
    trainer = trainer_with(end=End(steps=1000))
    trainer.run(steps=8)
    before, better = trainer.parameters.read(), torch.full((NUM_PARAMS,), 0.25)
    with pytest.raises(PeerError, match="not-ahead: step 8"):
        trainer.replace(better, step=500, until=8)
    assert (trainer.counters.step, torch.equal(trainer.parameters.read(), before)) == (8, True)
    trainer.replace(better, step=5, until=9)
    assert (trainer.counters.step, float(trainer.parameters.read()[0])) == (8, 0.25)


def test_a_state_that_is_not_finite_is_refused_and_ours_stays() -> None:
    trainer = trainer_with()
    before = trainer.parameters.read()
    with pytest.raises(PeerError) as error:
        trainer.replace(torch.full((NUM_PARAMS,), float("nan")), 3)
    assert error.value.reason == Reason.NOT_FINITE
    assert torch.equal(trainer.parameters.read(), before)


def test_snapshots_and_merges_are_timed_and_so_is_waiting_for_a_helper(clock: Clock) -> None:
    a, b = trainer_with(seed=1), trainer_with(seed=2)
    clock.tick = 1.0
    swap(a, b, 1, 0)
    assert a.progress().seconds_merge == 0.0
    merge(a, 1)
    progress = a.progress()
    assert min(progress.seconds_snapshot, progress.seconds_merge) > 0

    class Busy:
        """A lock that a helper lets go of after a while."""

        waits = 0

        def __enter__(self) -> None:
            self.waits += 1
            clock.advance(20.0)

        def __exit__(self, *error: object) -> None:
            pass

    busy, before = Busy(), a.progress().seconds_blocked
    a.exchanges._in_flight._lock = busy  # type: ignore[assignment]
    clock.tick = 0.0
    a.snapshot(2, 1, averaging=False)
    assert a.progress().seconds_blocked - before == 20.0 * busy.waits
    assert busy.waits


def test_three_peers_in_a_group_have_their_mean() -> None:
    peers = [trainer_with(seed=seed) for seed in range(3)]
    for peer in peers:
        unbounded(peer)
    indices = peers[0].exchanges.fragments.indices(0)
    mean = torch.stack([peer.parameters.read()[indices] for peer in peers]).mean(0)
    updates = [taken(peer, 1, 0) for peer in peers]
    for number, peer in enumerate(peers):
        others = [other for other in range(3) if other != number]
        for other in others:
            update = updates[other]
            peer.exchanges.verify(1, other, PeerUpdate(update.payload, update.form, ""))
        peer.exchanges.resolve(1, dict.fromkeys(others, 1 / 3))
        peer.merge(1)
        assert torch.allclose(peer.parameters.read()[indices], mean, atol=0.05)


def test_averaging_beside_an_outer_rule_moves_its_anchors() -> None:
    rules = Round(rule="noloco", fragments=1, codec="float32")
    a, b = trainer_with(seed=1, round=rules), trainer_with(seed=2, round=rules)
    updates = []
    for trainer in (a, b):
        private = trainer.snapshot(1, 0, averaging=True)
        updates.append(trainer.exchanges.compress(1, private))
    for trainer, update in ((a, updates[1]), (b, updates[0])):
        verify(trainer, 1, update)
        merge(trainer, 1)
        sent = trainer.snapshot(2, 0, averaging=False).values.view(2, -1)
        assert float(sent[0].norm()) < 1e-5  # theta - phi: training did nothing
        assert torch.allclose(sent[1], trainer.parameters.read(), atol=1e-5)
