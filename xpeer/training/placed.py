"""Computes with a model's values on a GPU for a while, and leaves them on the host as they are.

A founder measures a model before anybody trains it. On a processor that takes minutes for billions
of parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from xpeer.shortage import out_of_memory

_T = TypeVar("_T")


@contextmanager
def on_device(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Have copies of all values on a device within the block.

    Afterwards parameters and buffers have the very memory that they had, pages of a file included.
    """
    kept = [(tensor, tensor.data) for tensor in (*model.parameters(), *model.buffers())]
    try:
        for tensor, values in kept:
            tensor.data = values.to(device)
        yield
    finally:
        for tensor, values in kept:
            tensor.data = values


def on_best(model: torch.nn.Module, device: torch.device, work: Callable[[], _T]) -> _T:
    """Do work that computes with a model, on a GPU if there is one and the model fits.

    Args:
        model: on the CPU.
        device: to try; any but a GPU means the CPU.
        work: begins anew at each call; it computes where the model's values are.
    """
    if device.type == "cuda":
        try:
            with on_device(model, device):
                return work()
        except Exception as e:
            if not out_of_memory(e):
                raise
        torch.cuda.empty_cache()  # here the error is gone, and with it what its frames held
    return work()
