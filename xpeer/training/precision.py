"""Chooses the precision in which steps compute."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Final, Literal

import torch

from xpeer.errors import ConfigError
from xpeer.privacy.steps import FULL, Precision

Wanted = Literal["auto", "float32", "bfloat16"]

WORTH_IT: Final = 1.5
"""How many times as fast products in bfloat16 have to be on a CPU. The rest of a step gains nothing
by them, and pays for conversions."""
_SIZE: Final = 256
_REPEATS: Final = 5


def choose_precision(
    wanted: Wanted,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Precision, str]:
    """Choose the precision of steps, and say why, in words for the operator.

    auto is bfloat16 where the device is fast at it. CUDA says so itself. A CPU is measured, since
    its list of instructions says too little: some have them and run them slowly, and a library may
    lack kernels for them.

    Args:
        wanted: `training.precision`.
        device: to train on.
        clock: seconds, for the measurement.

    Raises:
        ConfigError: bfloat16 is wanted, and this device can't compute in it.
    """
    if wanted == "float32":
        return FULL, "computing in float32, as training.precision says"
    if wanted == "bfloat16":
        _require(device)
        return _half(device), "computing in bfloat16, as training.precision says"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return _half(device), "computing in bfloat16: this GPU has it"
        return FULL, "computing in float32: this GPU has no bfloat16"
    if device.type != "cpu":
        return FULL, f"computing in float32: {device.type} is not measured"
    ratio = _seconds(torch.float32, clock) / max(_seconds(torch.bfloat16, clock), 1e-9)
    if ratio >= WORTH_IT:
        return _half(device), f"computing in bfloat16: this CPU is {ratio:.2g} times as fast at it"
    return FULL, f"computing in float32: this CPU's bfloat16 has {ratio:.2g} times its speed"


def _half(device: torch.device) -> Precision:
    return Precision("bfloat16", partial(torch.autocast, device.type, dtype=torch.bfloat16))


def _require(device: torch.device) -> None:
    """Refuse bfloat16 on a device that has none, emulated or not."""
    problem = ""
    if device.type == "cuda":
        problem = "" if torch.cuda.is_bf16_supported() else "this GPU can't compute in it"
    else:
        try:
            torch.autocast(device.type, dtype=torch.bfloat16)
        except RuntimeError:
            problem = f"torch has none for {device.type}"
    if problem:
        raise ConfigError(
            f"training.precision = bfloat16: {problem}", "set it to auto or to float32"
        )


def _seconds(dtype: torch.dtype, clock: Callable[[], float]) -> float:
    """The least time of a product of two matrices, s."""
    matrix = torch.ones(_SIZE, _SIZE, dtype=dtype)
    least = float("inf")
    for _ in range(_REPEATS):
        began = clock()
        torch.mm(matrix, matrix)
        least = min(least, clock() - began)
    return least
