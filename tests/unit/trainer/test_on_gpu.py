"""Whole trainers on a GPU that is pretended: they do what they do on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.pretend_cuda import PretendCuda, pretend_there_is_one
from tests.unit.test_trial import init
from tests.unit.training.homes import make_homes
from xpeer import trial
from xpeer.founding_model import LoraOptions
from xpeer.trainer.build import assemble
from xpeer.training.checkpoint import load_latest


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    pretend_there_is_one(monkeypatch)


@pytest.mark.parametrize("lora", [None, LoraOptions(2)], ids=["whole", "adapters"])
@pytest.mark.parametrize("mode", ["record", "off"])
def test_a_node_trains_and_saves(mode: Any, lora: LoraOptions | None, tmp_path: Path) -> None:
    with PretendCuda():
        (setup,) = make_homes(tmp_path, 1, privacy=mode, lora=lora, device="cuda")
        made = assemble(setup)
        assert made.beginning.device == "cuda"
        before = made.trainer.measure()[0]
        made.trainer.run(3)
        after = made.trainer.measure()[0]
        made.checkpoints.copy()()
        made.close()
    assert made.trainer.counters.step == 3
    assert 0 < after < 1.5 * before
    bundle, _ = load_latest(Path(setup.home) / "checkpoints")
    assert bundle is not None
    assert torch.equal(bundle.flat, made.trainer.parameters.read())


def test_a_founder_tries_everything_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But an exchange: its codec takes what is on the CPU, and nothing is."""
    monkeypatch.setenv("XPEER_TRAINING_DEVICE", "cuda")
    monkeypatch.setattr(trial, "_exchange", lambda *_: None)
    with PretendCuda():
        code, err = init(tmp_path / "h", "--preset", "tiny")
    assert code == 0, err
    assert "parameters on cuda" in err
    assert "exported, and loaded again" in err
