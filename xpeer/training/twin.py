"""A model's twin: it computes with other values of the trained parameters while the model trains.

The twin shares the memory of all that is not trained: frozen weights, tables, codes. It has no
trained parameters of its own; they are lent for each measurement. What is hooked onto the model
later (engines, layers that are compiled or computed again) is not the twin's.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import nn

from xpeer.training.flat import trained, views

_SPARE: Final = 2
"""A device has to have so many times the memory of the trained parameters free. A step that ran out
of memory because of a joiner would go on with fewer records a pass for ever."""


class Twin:
    """Measures beside training; one thread at a time may use it.

    Args:
        model: on its device, before anything is hooked onto it; it stays as it is.

    Attributes:
        model: computes; outside of `with_values` it has no trained parameters.
    """

    def __init__(self, model: nn.Module) -> None:
        shared: dict[int, Any] = {}
        for module in model.modules():
            kept = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
            shared |= {id(each): each for each in kept if not _is_structure(each)}
        self._of = trained(model)
        self._own = [nn.Parameter(p.detach().new_empty(0), requires_grad=False) for p in self._of]
        shared |= {id(p): own for p, own in zip(self._of, self._own, strict=True)}
        self.model = copy.deepcopy(model, shared).eval()

    @contextlib.contextmanager
    def with_values(self, values: torch.Tensor) -> Iterator[None]:
        """Have the twin compute with these (num_params,) float32, CPU, within the block.

        On a CPU they are not copied, so nobody may change them meanwhile.

        Raises:
            MemoryError: the device has too little memory for them.
        """
        device = self._of[0].device
        self._require_room(device, values.nbytes)
        try:
            with _beside(device):
                for own, view in zip(self._own, views(self._of, values), strict=True):
                    own.data = view.to(device)
                yield
        finally:
            for own in self._own:
                own.data = own.new_empty(0)

    @staticmethod
    def _require_room(device: torch.device, num_bytes: int) -> None:
        if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < _SPARE * num_bytes:
            raise MemoryError("the device has no memory for a second set of trained parameters")


def _is_structure(value: object) -> bool:
    """Whether it is, or may hold, a part that a twin has to have of its own."""
    return value is None or isinstance(value, nn.Module | dict | list | set | tuple | Callable)


def _beside(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Another queue of the device: in training's own one steps would wait for what is measured."""
    if device.type == "cuda":
        return torch.cuda.stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
    return contextlib.nullcontext()
