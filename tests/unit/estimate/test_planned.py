"""The step that follows from a manifest and a node's settings."""

from __future__ import annotations

import pytest
import torch

from tests.unit.training.loops import manifest_with
from xpeer.config import Training
from xpeer.estimate.planned import smallest, step_of
from xpeer.founding_model import PRESETS
from xpeer.manifest import Manifest, Optimiser
from xpeer.manifest.model import Model
from xpeer.manifest.privacy import Privacy
from xpeer.training.model import skeleton

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FULL = Training(precision="float32")


def manifest(mode: str, length: int, batch: int = 64) -> Manifest:
    return manifest_with(
        model=Model(config=PRESETS["tiny"], num_params=1, initial_digest=""),
        optimiser=Optimiser(sequence_tokens=length, batch_records=batch),
        privacy=Privacy(mode=mode, noise_multiplier=1.0),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("mode", "length", "device", "records"),
    [
        ("record", 128, GPU, 1),
        ("record", 128, CPU, 8),
        ("record", 2048, CPU, 4),
        ("off", 128, CPU, 16),
        ("off", 4096, CPU, 1),
    ],
)
def test_records_of_a_pass_are_the_engines(
    mode: str, length: int, device: torch.device, records: int
) -> None:
    step = step_of(manifest(mode, length), FULL, device)
    assert (step.micro_batch, step.private) == (records, mode == "record")
    asked = Training(precision="float32", micro_batch=3)
    assert step_of(manifest(mode, length), asked, device).micro_batch == 3
    assert step_of(manifest(mode, length, batch=2), FULL, device).micro_batch <= 2


@pytest.mark.parametrize(
    ("setting", "first", "last"), [("auto", False, True), ("on", True, True), ("off", False, False)]
)
def test_layers_are_computed_again_as_the_settings_allow(
    setting: str, first: bool, last: bool
) -> None:
    settings = Training(precision="float32", checkpoint_activations=setting)  # type: ignore[arg-type]
    step = step_of(manifest("record", 128), settings, CPU)
    small = smallest(step, settings, skeleton(PRESETS["tiny"]))
    assert (step.recompute, small.recompute, small.micro_batch) == (first, last, 1)
    assert not smallest(step, settings, torch.nn.Linear(1, 1)).recompute
