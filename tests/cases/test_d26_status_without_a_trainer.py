"""D26: while the trainer is away, status says what was last known of it, and that it was."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from xpeer.config import NodeConfig
from xpeer.identity import PeerId
from xpeer.status import PrivacySpent, Progress
from xpeer.training.handle import TrainerProcess
from xpeer_daemon.node import Node


def test_a_step_that_was_taken_is_never_zero() -> None:
    now = [1e9]
    node = Node(PeerId("12D3KooWMe"), NodeConfig(), lambda: now[0])
    spent = PrivacySpent(epsilon_spent=3.2, epsilon_target=8.0, steps_charged=350)
    progress = Progress(step=340, window=34, tokens=5, loss_public=2.41, tokens_per_s=9.0)
    trainer = TrainerProcess(lambda event: None)
    trainer.progress, trainer.privacy = progress, spent
    trainer.num_params, trainer.device = 1000, "cpu"
    supervisor: Any = SimpleNamespace(trainer=trainer, restarts=0, down_reason="")
    node.supervisor = supervisor
    node.enter("training")
    if "privacy" in node.follow_trainer.__annotations__:
        node.follow_trainer("training", progress, spent)
    else:
        node.follow_trainer("training", progress)
    assert node.status().progress.step == 340
    supervisor.trainer, supervisor.down_reason = None, "trainer exited with -9"  # kill -9
    now[0] += 60
    status = node.status()
    assert status.progress.step == 340, f"step {status.progress.step} while the trainer is away"
    assert status.privacy.epsilon_spent == 3.2
    assert (status.round, status.num_params, status.device) == (34, 1000, "cpu")
    assert (status.trainer_runs, status.progress_age_s) == (False, 60.0)
