"""Faults of the trainer, its checkpoints and its losses are named until they are over."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.unit.daemon.fakes import ALPHA, FakeNode
from xpeer.config import Checkpoint, NodeConfig
from xpeer.errors import LocalError, TrainerError
from xpeer.status import PrivacySpent, Progress
from xpeer.trainer.answers import UNREADY, Losses


def test_a_trainer_that_dies_is_named_until_its_steps_are_taken_again(fake: FakeNode) -> None:
    fake.works(339)
    fake.supervisor.trainer, fake.supervisor.down_reason = None, "trainer exited with -9"
    fake.passes(3, working=False)
    status = fake.node.status()
    assert (status.health, status.trainer_runs, status.progress.step) == ("down", False, 340)
    assert fake.text("trainer-down") == "no trainer for 2s: trainer exited with -9"
    fake.supervisor.trainer, fake.supervisor.down_reason = fake.trainer, ""
    fake.step = 100
    fake.works()
    assert fake.codes == ["steps-lost"]
    assert "was at step 340, ended without a checkpoint, and is at step 101" in fake.text(
        "steps-lost"
    )
    fake.works(239)
    assert fake.codes == []


def test_a_trainer_that_stands_still(fake: FakeNode) -> None:
    fake.passes(100)
    fake.record.saved_s = fake.clock()
    for _ in range(119):
        fake.clock.now += 1
        fake.partners.last_done_s = fake.clock()
        assert fake.codes == []
    fake.clock.now += 2
    assert "no-step" in fake.codes
    fake.works()
    assert fake.codes == []


def test_a_node_that_catches_up_says_so_and_not_that_it_stands_still(fake: FakeNode) -> None:
    """A donor may feed it for hours."""
    fake.passes(10)
    fake.life.compares, fake.life.note = True, "fetching: 1.0 of 9.0 MB from 1 member"
    fake.life.wasted = "attempts: alpha (2 in vain)"
    for _ in range(300):
        fake.clock.now += 1
        assert not {"no-step", "no-exchange"} & set(fake.codes)
    assert fake.codes == ["catching-up"]
    assert fake.text("catching-up").endswith(
        ": fetching: 1.0 of 9.0 MB from 1 member; attempts: alpha (2 in vain)"
    )
    fake.life.compares = False
    assert "catching-up" not in fake.codes


def test_a_node_that_fetches_names_who_wasted_its_attempts(fake: FakeNode) -> None:
    fake.is_in("fetching")
    fake.life.wasted = "attempts: alpha (2 in vain)"
    assert fake.text("fetching") == "state is fetching; attempts: alpha (2 in vain)"


def test_what_the_test_at_the_start_refused_is_a_note(fake: FakeNode) -> None:
    fake.works()
    assert fake.codes == []
    spent = PrivacySpent(mode="record", engine="vmap", engine_refused="book-keeping: it is wrong")
    fake.trainer.privacy = spent
    assert fake.codes == ["steps-slower"]
    assert fake.node.status().health == "ok"
    text = "computed by vmap, since the test at the start refused what is mostly faster: "
    assert fake.text("steps-slower").endswith(f"{text}book-keeping: it is wrong")
    fake.trainer.privacy = PrivacySpent(mode="record", engine="vmap")
    assert fake.codes == []
    why = "layers are not compiled, and steps are slower: RuntimeError"
    fake.trainer.facts = msgspec.structs.replace(UNREADY, uncompiled=why)
    assert fake.text("steps-slower").endswith(why)


def test_slow_steps_are_not_taken_for_none(fake: FakeNode) -> None:
    for _ in range(10):
        fake.clock.now += 200
        fake.record.saved_s = fake.clock()
        fake.works()
    fake.clock.now += 1900
    fake.partners.last_done_s = fake.record.saved_s = fake.clock()
    assert fake.codes == []
    fake.clock.now += 200
    assert "no-step" in fake.codes


def test_checkpoints_that_do_not_come() -> None:
    fake = FakeNode(ALPHA, config=NodeConfig(checkpoint=Checkpoint(every_s=10)))
    fake.passes(149)
    assert fake.codes == []
    fake.passes(2)
    assert fake.codes == ["checkpoint-late"]
    fake.record.saved_s = fake.clock()
    assert fake.codes == []


async def test_a_checkpoint_that_cannot_be_written(
    fake: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full() -> str:
        raise LocalError("checkpoint: No space left on device", "free some")

    async def fine() -> str:
        return "/checkpoints/1"

    monkeypatch.setattr(fake.trainer, "checkpoint", full)
    with pytest.raises(LocalError):
        await fake.node.checkpoint()
    fake.passes(65)
    told = fake.text("checkpoint-failing")
    assert "for 1m 5s (1 tried): checkpoint: No space left on device - free some" in told
    assert fake.node.status().health == "degraded"
    monkeypatch.setattr(fake.trainer, "checkpoint", fine)
    await fake.node.checkpoint()
    assert fake.codes == []


def losses(fake: FakeNode, **fields: Any) -> None:
    """The trainer took a step, and says this of its losses."""
    fake.step += 1
    fake.node.follow_trainer("training", Progress(step=fake.step, tokens=1, **fields))


def test_losses_that_cannot_be_measured(fake: FakeNode) -> None:
    losses(fake, loss_problem="CUDA out of memory")
    fake.node.reasons()
    for _ in range(65):
        fake.clock.now += 1
        fake.partners.last_done_s = fake.clock()
        losses(fake, loss_problem="CUDA out of memory")
        fake.node.reasons()
    told = fake.text("evaluation-failing")
    assert told.endswith("can't be measured for 1m 5s: CUDA out of memory")
    assert fake.node.status().health == "degraded"
    losses(fake)
    assert fake.codes == []


async def test_losses_of_the_end_that_cannot_be_measured(
    fake: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fails() -> Losses:
        raise TrainerError("the trainer failed: OutOfMemoryError", "see the log")

    async def works() -> Losses:
        return Losses(2.0, None)

    monkeypatch.setattr(fake.trainer, "evaluate", fails)
    for _ in range(3):
        with pytest.raises(TrainerError):
            await fake.record.evaluate(fake.trainer)
        fake.passes(10)
    assert "for 29s: the trainer failed: OutOfMemoryError" in fake.text("evaluation-failing")
    monkeypatch.setattr(fake.trainer, "evaluate", works)
    await fake.record.evaluate(fake.trainer)
    assert fake.codes == []


def test_losses_that_are_old(fake: FakeNode) -> None:
    def at(age_s: float) -> list[str]:
        fake.partners.last_done_s = fake.record.saved_s = fake.clock()
        losses(fake, loss_measured_step=1, loss_measured_age_s=age_s)
        return fake.codes

    fake.clock.now += 7200
    assert at(3599) == []
    assert at(3725) == ["evaluation-late"]
    assert "for 1h 2m: that is done at a window's end" in fake.text("evaluation-late")
    assert fake.node.status().health == "ok"
    assert at(2) == []
    fake.is_in("paused")
    assert "evaluation-late" not in at(9999)
