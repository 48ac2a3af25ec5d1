"""Losses are measured in the memory of a step, and a kill meanwhile costs no first window."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tests.mortal import exit_code
from tests.unit.training.homes import make_homes
from xpeer.config import Home
from xpeer.trainer.build import assemble
from xpeer.trainer.server import serve
from xpeer.trainer.setup import TrainerSetup
from xpeer.training import head
from xpeer.training.checkpoint import load_latest

FEW = ("privacy.noise_multiplier=2.0", "privacy.epsilon=8", "optimiser.batch_records=8")


@pytest.mark.parametrize(
    ("given", "most"), [({"micro_batch": 1}, 1), ({"micro_batch": 3}, 3), ({}, 8)]
)
@pytest.mark.parametrize("privacy", ["off", "record"])
def test_a_pass_that_measures_has_no_more_records_than_one_of_a_step(
    given: dict[str, Any],
    most: int,
    privacy: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And few tokens, where a joiner's parameters are measured beside a step."""
    changes = FEW if privacy == "record" else FEW[2:]
    (setup,) = make_homes(tmp_path, 1, privacy=privacy, changes=changes, **given)
    node = assemble(setup)
    loop, rows, tokens = node.trainer, list[int](), list[int]()
    real = head.losses_of_tokens

    def noted(output: Any, hidden: torch.Tensor, *more: Any) -> torch.Tensor:
        rows.append(len(hidden))
        tokens.append(hidden.shape[:2].numel())
        return real(output, hidden, *more)

    monkeypatch.setattr(head, "losses_of_tokens", noted)
    loop.measure()
    assert max(rows) == most
    tokens.clear()
    loop.measurements.public_of_copy(loop.parameters.read())
    assert max(tokens) <= 1024
    node.close()


def live(setup: TrainerSetup) -> None:
    """Train as a trainer's process does, until it is killed in its first measurement."""
    torch.set_num_threads(1)
    node = assemble(setup)
    serve(lambda _message: None, cast(Any, None), node, setup.config.checkpoint.every_s)
    evaluation: Any = node.trainer.measurements._evaluation

    def kill() -> float:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0.0

    object.__setattr__(evaluation, "public", kill)
    node.trainer.run(steps=100)


def test_a_kill_in_the_first_measurement_leaves_a_checkpoint(tmp_path: Path) -> None:
    """So that memory that runs out in it does not cost the first window's charges at each start."""
    (setup,) = make_homes(tmp_path, 1, privacy="record", changes=FEW)
    assert exit_code(live, setup) == -signal.SIGKILL
    saved, problems = load_latest(Home(Path(setup.home)).checkpoints)
    assert saved is not None, problems
    assert (saved.step, saved.counters["charges_used"]) == (4, 4)
    node = assemble(setup)
    assert node.beginning.steps_forfeited < 4, "what was charged ahead, but no window"
    node.close()
