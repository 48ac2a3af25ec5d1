"""Memory of the optimiser's step: it is there before a step is charged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.pretend_cuda import Largest
from tests.unit.training.homes import make_homes
from tests.unit.training.loops import (
    NUM_PARAMS,
    Parameters,
    manifest_with,
    mechanism_of,
    trainer_with,
)
from xpeer.errors import ShortOfMemoryError
from xpeer.manifest import End
from xpeer.trainer.build import assemble
from xpeer.training.flat import FlatParameters
from xpeer.training.optimiser import allocate_moments, make_optimiser

GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class NoZeros(TorchFunctionMode):
    """Memory is short from the first zeros on, after so many that are made."""

    def __init__(self, left: int = 0) -> None:
        super().__init__()
        self.left = left

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.zeros_like:
            self.left -= 1
            if self.left < 0:
                raise GPU
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("left", [0, 1])
def test_without_memory_for_moments_no_step_is_charged(left: int) -> None:
    trainer = trainer_with(end=End(steps=10))
    with NoZeros(left), pytest.raises(ShortOfMemoryError, match="AdamW's moments") as e:
        trainer.run(steps=1)
    assert "xpeer estimate" in str(e.value)
    assert mechanism_of(trainer).calls == []
    trainer.run(steps=1)  # there is memory again
    assert trainer.counters.step == 1


def test_a_real_node_charges_its_documents_nothing_then(tmp_path: Path) -> None:
    (setup,) = make_homes(tmp_path, 1, privacy="record")
    made = assemble(setup)
    with NoZeros(1), pytest.raises(ShortOfMemoryError, match="moments"):
        made.trainer.run(1)
    assert made.ledger.steps_charged == 0
    made.trainer.run(1)
    assert made.ledger.steps_charged == 1
    made.close()


def test_a_new_beginning_at_a_donors_step_is_prepared_too() -> None:
    trainer = trainer_with(end=End(steps=10))
    trainer.run(steps=2)
    trainer.replace(trainer.parameters.read(), 4)
    mechanism_of(trainer).calls.clear()
    with NoZeros(), pytest.raises(ShortOfMemoryError):
        trainer.run(steps=1)
    assert mechanism_of(trainer).calls == []


def test_a_windows_gradient_takes_the_place_of_the_last_one() -> None:
    """Its steps were charged: there is no second gradient that could find no room."""
    model = torch.nn.Linear(5, 3)
    parameters = FlatParameters(model)
    flat = parameters.read_gradients()
    places = []
    for value in (1.0, 2.0):
        parameters.write_gradients(torch.full_like(flat, value))
        places.append([p.grad.data_ptr() for p in model.parameters() if p.grad is not None])
    assert places[0] == places[1]
    assert torch.equal(parameters.read_gradients()[:18], torch.full((18,), 2.0))


def test_an_optimiser_that_is_prepared_steps_as_a_fresh_one_and_takes_no_memory() -> None:
    found = []
    for prepared in (True, False):
        parameters = Parameters(1)
        optimiser = make_optimiser(manifest_with(), parameters)
        if prepared:
            allocate_moments(optimiser)
        for step in range(3):
            parameters.weight.grad = torch.linspace(-1.0, 1.0, NUM_PARAMS) * (step + 1)
            with Largest(parameters.weight, parameters.weight.grad) as seen:
                optimiser.step()
            if prepared:
                assert seen.values <= 1
        found.append((parameters.read(), optimiser.state_dict()["state"][0]))
    (ours, our_state), (theirs, their_state) = found
    assert torch.equal(ours, theirs)
    assert our_state.keys() == their_state.keys()
    for name, value in our_state.items():
        assert torch.equal(value, their_state[name])
        assert value.dtype == their_state[name].dtype
