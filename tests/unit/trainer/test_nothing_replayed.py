"""Under privacy nothing is sampled twice from one state: a resumed run draws anew, and no file of a
home holds what samples or noise were drawn from.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.unit.training.homes import make_homes
from xpeer.privacy.noise import SecretGenerator
from xpeer.trainer.build import assemble
from xpeer.trainer.setup import TrainerSetup
from xpeer.training import checkpoint
from xpeer.training.checkpoint_files import paths
from xpeer.training.schedule import Counters
from xpeer.training.tensor_file import map_tensors

FEW = ("privacy.noise_multiplier=2.0", "privacy.epsilon=50", "optimiser.batch_records=6")
KEY_BYTES = 32
"""Of the noise."""


def run(
    setup: TrainerSetup, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[list[int]], list[bytes]]:
    """Three steps from the newest checkpoint, and another one: the samples, and the bits drawn."""
    sampled: list[list[int]] = []
    drawn: list[bytes] = []
    sample, urandom = SecretGenerator.poisson_sample, os.urandom

    def noted(self: SecretGenerator, num_records: int, probability: float) -> torch.Tensor:
        found = sample(self, num_records, probability)
        sampled.append(found.tolist())
        return found

    def kept(size: int) -> bytes:
        drawn.append(urandom(size))
        return drawn[-1]

    with monkeypatch.context() as patch:
        patch.setattr(SecretGenerator, "poisson_sample", noted)
        patch.setattr(os, "urandom", kept)
        node = assemble(setup)
        node.trainer.run(steps=3)
        node.checkpoints.copy()()
        node.close()
    return sampled, drawn


def test_a_resumed_run_draws_anew_and_no_file_holds_what_it_drew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (setup,) = make_homes(tmp_path, 1, privacy="record", changes=FEW)
    home = Path(setup.home)
    _, first = run(setup, monkeypatch)
    saved = tmp_path / "saved"
    shutil.copytree(home / "checkpoints", saved)
    once, bits = run(setup, monkeypatch)
    shutil.rmtree(home / "checkpoints")
    shutil.copytree(saved, home / "checkpoints")
    again, more = run(setup, monkeypatch)  # from the same checkpoint
    keys = [key for key in [*first, *bits, *more] if len(key) >= 16]
    assert len(set(keys)) == len(keys)
    assert len(once) == len(again) == 3
    assert once != again  # equal by chance: below 1e-9
    assert any(len(key) == KEY_BYTES for key in keys)
    for path in home.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert not any(key in content for key in keys), path


def test_a_checkpoint_holds_parameters_moments_and_counters_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is added to it later has to be thought about here."""
    (setup,) = make_homes(tmp_path, 1, privacy="record", changes=FEW)
    run(setup, monkeypatch)
    (path,) = paths(Path(setup.home) / "checkpoints")
    tensors, words, _ = map_tensors(path)
    assert set(tensors) == {"flat", "exp_avg", "exp_avg_sq", "seen"}
    assert tensors["seen"].numel() == 0  # the position in the shard: without privacy alone
    assert set(words) == {"xpeer"}
    counters = checkpoint.load(path).counters
    assert set(counters) == set(Counters().to_dict())
    assert set(counters) == {
        "step", "window", "tokens", "seconds", "moments_step", "joined", "merges",
        "merges_clipped", "charges_used", "clip_norm",
    }  # fmt: skip
