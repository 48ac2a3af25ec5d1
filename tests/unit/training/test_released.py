"""Update mode in the loop: what is shown, saved and merged is what was released, and only that."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from tests.unit.training.homes import make_homes
from xpeer.training import checkpoint
from xpeer.training.assemble import Assembled, assemble
from xpeer.training.flat import FlatParameters
from xpeer.training.handle import Event, TrainerProcess
from xpeer.training.released import Released
from xpeer.training.setup import TrainerSetup
from xpeer.wire import codec

CHANGES = ("privacy.noise_multiplier=2", "privacy.clip_norm=0.01", "round.codec=float32")


def home(folder: Path, *changes: str) -> TrainerSetup:
    return make_homes(folder, 1, privacy="update", changes=(*CHANGES, *changes))[0]


@pytest.fixture
def setup(tmp_path: Path) -> TrainerSetup:
    return home(tmp_path)


@pytest.fixture
def node(setup: TrainerSetup):
    made = assemble(setup)
    yield made
    made.close()


def released_of(node: Assembled) -> Released:
    parameters = node.trainer.parameters
    assert isinstance(parameters, Released)
    return parameters


def working_of(node: Assembled) -> torch.Tensor:
    working: torch.Tensor = released_of(node)._working.read()
    return working


def shown_by(node: Assembled, meeting: int, fragment: int) -> torch.Tensor:
    """A fragment as it goes to a partner."""
    update = node.trainer.snapshot(meeting, fragment, averaging=False)
    sent = node.trainer.exchanges.compress(meeting, update)
    return codec.decode("float32", sent.payload, sent.num_values)


def test_within_a_window_nothing_that_is_shown_moves(node: Assembled) -> None:
    trainer, before = node.trainer, released_of(node).read()
    loss_before = trainer.public_loss()
    trainer.run(steps=3)  # of 4
    assert not torch.equal(working_of(node), before)
    assert torch.equal(released_of(node).read(), before)
    fragments = trainer.exchanges.fragments
    for fragment in range(fragments.num_fragments):
        expected = fragments.gather(released_of(node).flat, fragment)
        assert torch.equal(shown_by(node, fragment, fragment), expected)
    given = torch.empty(len(before))
    finish = trainer.show(given)  # a joiner's state and its loss
    assert finish() == pytest.approx(loss_before)
    assert torch.equal(given, before)
    assert trainer.measure()[0] == pytest.approx(loss_before)
    assert trainer.progress().loss_public == pytest.approx(loss_before)
    assert not torch.equal(working_of(node), before)  # and looking changed nothing


def test_a_window_ends_with_a_clipped_and_noised_release(
    node: Assembled, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, before = node.trainer, released_of(node).read()
    seen: list[torch.Tensor] = []
    privatise = node.mechanism.privatise  # type: ignore[attr-defined] # an UpdateMechanism

    def watched(difference: torch.Tensor) -> torch.Tensor:
        seen.append(difference.clone())
        noised: torch.Tensor = privatise(difference)
        return noised

    monkeypatch.setattr(released_of(node), "_privatise", watched)
    trainer.run(steps=4)
    learnt = seen[0]
    noise = released_of(node).read() - before
    noise -= learnt * min(1.0, 0.01 / float(learnt.norm()))
    assert float(learnt.norm()) > 0.01  # it was clipped
    assert float(noise.double().std()) == pytest.approx(2 * 0.01, rel=0.02)
    assert abs(float(torch.nn.functional.cosine_similarity(noise, learnt, dim=0))) < 0.02
    assert torch.equal(working_of(node), released_of(node).read())  # it starts from there
    assert not trainer.optimiser.state  # the moments knew more than was released
    assert node.ledger.steps_charged == 1
    padding = released_of(node).flat[released_of(node).num_params :]
    assert not padding.any()


def test_what_is_merged_in_mid_window_is_no_part_of_what_was_learnt(node: Assembled) -> None:
    trainer = node.trainer
    trainer.run(steps=2)
    learnt = working_of(node) - released_of(node).read()
    before = released_of(node).read()
    theirs = shown_by(node, 1, 0) + 1e-3
    payload = memoryview(codec.encode("float32", theirs))
    trainer.exchanges.verify(1, 7, "float32", payload, len(theirs))
    trainer.exchanges.resolve(1, {7: 0.5})
    trainer.merge(1)
    moved = released_of(node).read() - before
    assert float(moved.max()) == pytest.approx(5e-4, rel=1e-3)
    assert torch.allclose(working_of(node) - released_of(node).read(), learnt, atol=1e-6)


def test_a_checkpoint_in_mid_window_holds_nothing_unreleased(
    setup: TrainerSetup, node: Assembled
) -> None:
    node.trainer.run(steps=6)  # one window and a half
    released, working = released_of(node).read(), working_of(node)
    bundle = checkpoint.load(Path(node.capture()()))
    assert torch.equal(bundle.flat, released)
    assert torch.equal(bundle.consolidated(), released)
    assert not bundle.exp_avg.any()
    assert not bundle.exp_avg_sq.any()
    assert bundle.optimiser_step == 0
    assert len(bundle.seen) == 0
    assert node.ledger.steps_charged == 2
    again = assemble(setup)  # as after a crash: the window is lost, its charge is not
    try:
        assert torch.equal(working_of(again), released)
        assert not torch.equal(working_of(again), working)
        assert again.ledger.steps_charged == 2
        again.trainer.run(steps=1)
        assert again.ledger.steps_charged == 3
    finally:
        again.close()


def test_the_last_window_is_released_though_it_is_short(tmp_path: Path) -> None:
    node = assemble(home(tmp_path, "end.steps=6"))
    try:
        node.trainer.run(steps=4)
        first = released_of(node).read()
        node.trainer.run(steps=4)
        assert node.trainer.state == "closing"
        assert node.trainer.counters.step == 6
        assert not torch.equal(released_of(node).read(), first)
        assert torch.equal(working_of(node), released_of(node).read())
        assert node.ledger.steps_charged == 2
    finally:
        node.close()


def test_a_joiner_begins_with_what_it_was_given(node: Assembled) -> None:
    node.trainer.run(steps=3)
    given = torch.zeros(released_of(node).num_params)
    node.trainer.replace(given, 3)
    assert torch.equal(released_of(node).read(), given)
    assert torch.equal(working_of(node), given)
    node.trainer.run(steps=6)  # windows that its donor's step has shortened: each is paid for
    assert node.ledger.steps_charged >= 2


async def test_a_trainer_process_in_update_mode(tmp_path: Path) -> None:
    events: asyncio.Queue[Event] = asyncio.Queue()
    trainer = await TrainerProcess.start(home(tmp_path), events.put_nowait)
    try:
        while trainer.progress.window < 2 or trainer.privacy.steps_charged < 2:
            await events.get()
        assert (trainer.privacy.mode, trainer.engine) == ("update", "one release a window")
        update = await trainer.snapshot(1, 0, averaging=False)
        assert update.stamp.mode == "update"
        assert trainer.ledger_counter >= 2
    finally:
        await trainer.kill()


def test_ordinary_parameters_show_what_is_trained() -> None:
    model = torch.nn.Linear(3, 5)
    parameters = FlatParameters(model)
    own, other = parameters.read(), torch.zeros(20)
    with parameters.showing():
        assert torch.equal(parameters.read(), own)
    with parameters.showing(other):
        assert not model.weight.any()
    assert torch.equal(parameters.read(), own)
    assert parameters.followers == ()
    assert not parameters.end_window()
