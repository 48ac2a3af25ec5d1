"""Layers that are computed again in the backward pass: the same gradients, with less kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.privacy.models import adapted, gpt2, llama, record_losses, some_records
from tests.unit.training.homes import make_homes
from xpeer.errors import ConfigError
from xpeer.privacy import record_gradients
from xpeer.privacy.clipping import (
    BookKeepingEngine,
    FunctionalEngine,
    MicrobatchEngine,
    trainable,
)
from xpeer.trainer.build import assemble
from xpeer.training.losses import choose_losses
from xpeer.training.recompute import Recomputing

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: llama(tied=False),
    "llama-lora": lambda: adapted(llama(tied=True)),
    "gpt2-tied": lambda: gpt2(tied=True),
}


def clipped(engine: Any, model: nn.Module, losses: Any) -> tuple[Tensor, Tensor]:
    """Norms, and the sum as one vector."""
    sums = [torch.zeros_like(p) for p in trainable(model)]
    told = engine(model, losses, **({} if engine is MicrobatchEngine else {"micro_batch": 3}))
    norms = told.accumulate(some_records(), 0.5, sums).norms
    return norms, torch.cat([x.flatten() for x in sums])


@pytest.mark.parametrize("ratio", [0, 20])
@pytest.mark.parametrize("engine", [BookKeepingEngine, FunctionalEngine, MicrobatchEngine])
@pytest.mark.parametrize("name", MODELS)
def test_every_engine_finds_the_same(
    name: str, engine: Any, ratio: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tap within a layer that is computed twice does not count its gradient twice."""
    monkeypatch.setattr(record_gradients, "_WRITTEN_RATIO", ratio)
    model = MODELS[name]()
    norms, sums = clipped(MicrobatchEngine, model, record_losses)
    recomputing = Recomputing(model)
    assert recomputing.switch_on() == "2 layers computed again in the backward pass"
    assert recomputing.switch_on() == ""
    for losses in (record_losses, choose_losses(model)[0]):
        found, mine = clipped(engine, model, losses)
        torch.testing.assert_close(found, norms, rtol=1e-5, atol=0)
        torch.testing.assert_close(mine, sums, rtol=1e-5, atol=1e-6 * float(sums.norm()))


@pytest.mark.parametrize("engine", [BookKeepingEngine, None], ids=["private", "plain"])
def test_less_is_kept_between_the_passes(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(llama(tied=True))

    def kept() -> int:
        """Bytes that autograd keeps for the backward pass, and engines for theirs."""
        total = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        def losses(model: nn.Module, records: Tensor) -> tuple[Tensor, Tensor]:
            with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
                return record_losses(model, records)

        if engine is None:
            losses(model, some_records())[0].sum().backward()
        else:
            clipped(engine, model, losses)
        return total

    before = kept()
    Recomputing(model).switch_on()
    assert kept() < 0.5 * before


@pytest.mark.parametrize("mode", ["record", "off"])
def test_the_setting_switches_it_on(mode: Any, tmp_path: Path) -> None:
    (setup,) = make_homes(tmp_path, 1, privacy=mode, checkpoint_activations="on")
    made = assemble(setup)
    assert any("computed again" in note for note in made.beginning.notes)
    made.trainer.run(2)
    assert made.trainer.counters.step == 2
    made.close()


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"training\.checkpoint_activations = on"):
        Recomputing(nn.Linear(2, 2)).require()
