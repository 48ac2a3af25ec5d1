"""Settings with which a step would fit are found with few rehearsals."""

from __future__ import annotations

from dataclasses import replace

import pytest

from xpeer.estimate import remedies
from xpeer.estimate.step import Step, StepMemory
from xpeer.manifest.model import Lora

STEP = Step(config={}, sequence_tokens=8, micro_batch=4, private=True)
ADAPTERS = replace(STEP, lora=Lora(4, 8.0, 1, ""))
ON_GPU = replace(ADAPTERS, device="cuda")
RECORDS, AGAIN = "training.micro_batch = 1", "training.checkpoint_activations = on"
HALF = "training.precision = bfloat16, on a device that has it"
HELD = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0625, "nf4": 0.5625}


class Made:
    """Steps of 10 trained parameters and 40 frozen ones, whose records need 100 bytes each."""

    def __init__(self) -> None:
        self.number = 0

    def of(self, step: Step) -> StepMemory:
        self.number += 1
        frozen = 0 if step.lora is None else 40
        each = 100 // (4 if step.recompute else 1) // (2 if step.precision == "bfloat16" else 1)
        return StepMemory(
            num_trained=10,
            num_frozen=frozen,
            weights=40 + round(HELD[step.base_dtype] * frozen),
            moments=80,
            working=40 + each * step.micro_batch,
        )


@pytest.mark.parametrize(
    ("step", "named", "unnamed"),
    [
        (STEP, "(--lora-rank 16)", "--base-dtype"),
        (ADAPTERS, "(--base-dtype bfloat16)", "(--lora-rank 16)"),
        (ON_GPU, "(--base-dtype bfloat16 or int8 or nf4)", "(--lora-rank 16)"),
        (replace(ON_GPU, base_dtype="bfloat16"), "(--base-dtype int8 or nf4)", "bfloat16"),
        (replace(ADAPTERS, base_dtype="bfloat16"), "a lower --lora-rank", "--base-dtype"),
        (replace(ON_GPU, base_dtype="nf4"), "a lower --lora-rank", "--base-dtype"),
    ],
)
def test_where_no_setting_helps_only_what_would_is_named(
    step: Step, named: str, unnamed: str
) -> None:
    """Nobody who trains adapters is told to train adapters."""
    said = remedies.none_helps(step)
    assert named in said
    assert unnamed not in said


@pytest.mark.parametrize(
    ("step", "most", "words", "rehearsals"),
    [
        (STEP, 270, RECORDS, 2),
        (STEP, 200, f"{RECORDS}, {AGAIN}", 2),
        (STEP, 180, f"{RECORDS}, {AGAIN}, {HALF}", 2),
        (STEP, 165, None, 2),
        (STEP, 159, None, 0),
        (replace(STEP, micro_batch=1), 200, AGAIN, 1),
        (replace(STEP, recompute=True), 190, RECORDS, 1),
        (ADAPTERS, 270, f"{RECORDS}, {AGAIN}, {HALF}, xpeer init --base-dtype bfloat16", 1),
        (ADAPTERS, 230, f"{RECORDS}, {AGAIN}, {HALF}, xpeer init --base-dtype int8", 1),
        (ADAPTERS, 200, f"{RECORDS}, {AGAIN}, {HALF}, xpeer init --base-dtype nf4", 1),
        (ADAPTERS, 180, None, 0),
    ],
)
def test_the_first_that_fits(step: Step, most: int, words: str | None, rehearsals: int) -> None:
    memory, made = Made().of(step), Made()
    assert memory.peak > most
    remedy = remedies.find(step, memory, most, made.of)
    assert (None if remedy is None else remedy.words) == words
    assert made.number == rehearsals
    if remedy is not None:
        assert remedy.memory.peak <= most


def test_a_node_can_not_change_what_its_founder_decided() -> None:
    memory = Made().of(ADAPTERS)
    assert remedies.find(ADAPTERS, memory, 270, Made().of, founding=False) is None


def test_layers_that_can_not_be_computed_again_are_no_remedy() -> None:
    memory, made = Made().of(STEP), Made()
    assert remedies.find(STEP, memory, 200, made.of, again=False) is None
    remedy = remedies.find(STEP, memory, 230, made.of, again=False)
    assert remedy is not None
    assert (remedy.words, remedy.memory) == (f"{RECORDS}, {HALF}", Made().of(
        replace(STEP, micro_batch=1, precision="bfloat16")
    ))  # fmt: skip
