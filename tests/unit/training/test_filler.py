"""Models whose initial values are replaced at once: nothing is drawn, and all else is as usual."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from benchmarks.families.models import FAMILIES, VOCABULARY
from tests.unit.training.homes import make_homes
from xpeer.trainer.build import assemble
from xpeer.training.losses import record_losses
from xpeer.training.model import build, read_flat, write_flat

IDS = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_is_given_its_values_is_the_usual_one(family: str) -> None:
    usual, other = (build(FAMILIES[family], seed=seed) for seed in (1, 2))
    before = torch.random.get_rng_state()
    model = build(FAMILIES[family])
    assert torch.equal(torch.random.get_rng_state(), before), "values were drawn"
    buffers = dict(usual.named_buffers())
    assert [name for name, _ in model.named_buffers()] == list(buffers)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    for (name, value), drawn, again in zip(
        model.named_parameters(), usual.parameters(), other.parameters(), strict=True
    ):
        if torch.equal(drawn, again):  # ones of norms, zeros of biases
            assert torch.equal(value, drawn), name
        else:
            assert 0.5 < float((value.std() / drawn.std()).detach()) < 2, name
    write_flat(model, read_flat(usual))
    with torch.no_grad():
        assert torch.equal(record_losses(model, IDS)[0], record_losses(usual, IDS)[0])


def test_a_joiners_trainer_draws_no_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    drawn: list[int] = []
    for name in ("normal_", "uniform_"):
        real = getattr(torch.Tensor, name)

        def counted(tensor: torch.Tensor, *arguments: Any, real: Any = real, **options: Any) -> Any:
            state = torch.random.get_rng_state()
            result = real(tensor, *arguments, **options)
            if not torch.equal(state, torch.random.get_rng_state()):
                drawn.append(tensor.numel())
            return result

        monkeypatch.setattr(torch.Tensor, name, counted)
    changes = ("privacy.noise_multiplier=2", "privacy.epsilon=8", "optimiser.batch_records=2")
    setup = make_homes(tmp_path, 1, privacy="record", changes=changes)[0]
    drawn.clear()  # the founder drew its model
    node = assemble(msgspec.structs.replace(setup, initial="awaited"))
    node.close()
    assert drawn == []
