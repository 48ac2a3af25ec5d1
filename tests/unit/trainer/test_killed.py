"""kill -9 anywhere in a node's windows and checkpoints, again and again."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.mortal import exit_code
from tests.unit.training.homes import make_homes
from xpeer.accounts.accountant import Segment, epsilon, epsilon_worst
from xpeer.accounts.guarded_file import GuardedFile
from xpeer.accounts.ledger import Ledger
from xpeer.accounts.register import Register
from xpeer.config import Home
from xpeer.trainer.assembled import Assembled
from xpeer.trainer.build import assemble
from xpeer.trainer.setup import TrainerSetup

SIGMA = 2.0
FEW = (f"privacy.noise_multiplier={SIGMA}", "privacy.epsilon=8", "optimiser.batch_records=2")
LIVES = 6
"""Of a node."""
LONGEST = 150
"""Calls to the operating system or to SQLite that a life may last; windows take about 25 each."""

Count = Callable[[], None]


def live(setup: TrainerSetup, taken: Path, dies_at: int) -> None:
    """Start, and train with a checkpoint after every second step, until killed."""
    torch.set_num_threads(1)
    node = assemble(setup)
    step = node.mechanism.step_gradient
    with taken.open("ab", buffering=0) as log, deadly(dies_at) as count:

        def noted() -> Any:
            count()
            log.write(b".")  # from here on the step may be seen
            return step()

        node.mechanism.step_gradient = noted  # type: ignore[method-assign]
        while True:
            node.trainer.run(steps=2)
            count()
            node.checkpoints.copy()()


@contextmanager
def deadly(dies_at: int) -> Iterator[Count]:
    """Every call that changes the disk counts, and the process ends before or after one of them."""
    left = dies_at

    def count() -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            count()
            result = function(*args, **kwargs)
            count()
            return result

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "replace", "rename", "unlink", "write"):
            patch.setattr(os, name, counted(getattr(os, name)))
        # statements of connections that are open already
        patch.setattr(GuardedFile, "transaction", counted(GuardedFile.transaction))
        patch.setattr(Ledger, "_store", counted(Ledger._store))
        patch.setattr(Register, "_written", counted(Register._written))
        patch.setattr(Register, "charge", counted(Register.charge))
        yield count


def killed(setup: TrainerSetup, taken: Path, dies_at: int) -> None:
    assert exit_code(live, setup, taken, dies_at) == -signal.SIGKILL


def true_epsilon(node: Assembled, taken: Path) -> float:
    """Of the steps that were taken, whatever the ledger knows of them."""
    (kind,) = node.ledger.segments()
    steps = taken.stat().st_size
    return epsilon([Segment(SIGMA, kind.sampling_probability, steps)], node.spent().delta or 0.0)


@pytest.mark.parametrize("seed", range(2))
def test_killed_and_restored_again_and_again(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    (setup,) = make_homes(tmp_path, 1, privacy="record", changes=FEW)
    node = assemble(setup)  # a first checkpoint and charge
    node.trainer.run(steps=1)
    node.checkpoints.copy()()
    home = Home(Path(setup.home))
    node.close()
    taken, older = tmp_path / "taken", tmp_path / "older"
    taken.write_bytes(b".")
    shutil.copytree(home.checkpoints, older)
    told, charged = 0.0, 0
    for _ in range(LIVES):
        killed(setup, taken, chance.randint(1, LONGEST))
        if chance.random() < 0.3:
            shutil.rmtree(home.checkpoints)
            shutil.copytree(older, home.checkpoints)
        elif chance.random() < 0.3:
            shutil.rmtree(older)
            shutil.copytree(home.checkpoints, older)
        if chance.random() < 0.2:
            shutil.rmtree(setup.config.privacy.register or os.environ["XPEER_PRIVACY_REGISTER"])
        node = assemble(setup)
        spent, true = node.spent(), true_epsilon(node, taken)
        assert spent.epsilon_spent >= true
        assert spent.epsilon_spent >= told
        assert epsilon(node.ledger.segments(), spent.delta or 0.0) >= true
        assert epsilon_worst(node.ledger.histories(), spent.delta or 0.0) >= true
        told, charged = spent.epsilon_spent, node.ledger.steps_charged
        node.close()
    assert taken.stat().st_size > 10  # it did train
    assert charged <= taken.stat().st_size + 8 * (LIVES + 1)  # two windows for each death
