"""D26: while the trainer is away, status says what was last known of it, and that it was."""

from __future__ import annotations

from msgspec import structs

from tests.unit.daemon.fakes import FakeNode
from xpeer.status import PrivacySpent, Progress
from xpeer.trainer.client import TrainerProcess


def test_a_step_that_was_taken_is_never_zero() -> None:
    fake = FakeNode()
    node = fake.node
    spent = PrivacySpent(epsilon_spent=3.2, epsilon_target=8.0, steps_charged=350)
    progress = Progress(step=340, window=34, tokens=5, loss_public=2.41, tokens_per_s=9.0)
    trainer = TrainerProcess(lambda event: None)
    trainer.progress, trainer.privacy = progress, spent
    trainer.facts = structs.replace(trainer.facts, num_params=1000, device="cpu")
    supervisor = fake.supervisor
    supervisor.trainer = trainer
    node.follow_trainer("training", progress, spent)
    assert node.status().progress.step == 340
    supervisor.trainer, supervisor.down_reason = None, "trainer exited with -9"  # kill -9
    fake.clock.now += 60
    status = node.status()
    assert status.progress.step == 340, f"step {status.progress.step} while the trainer is away"
    assert status.privacy.epsilon_spent == 3.2
    assert (status.round, status.num_params, status.device) == (34, 1000, "cpu")
    assert (status.trainer_runs, status.progress_age_s) == (False, 60.0)
