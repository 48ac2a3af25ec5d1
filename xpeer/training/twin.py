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

from xpeer.privacy.products import multiplying_elsewhere
from xpeer.training import head
from xpeer.training.flat import trained, views
from xpeer.training.losses import transformers_model

_PASS_TOKENS: Final = 1024
_LOGITS: Final = 3
_LAYER: Final = 8
"""Tensors of logits, and of a layer's widest values, that a pass has at once, at most."""


class Twin:
    """Measures beside training; one thread at a time may use it.

    Args:
        model: on its device, before anything is hooked onto it; it stays as it is.
        num_tokens: of a record to measure on.

    Attributes:
        model: computes; outside of `with_values` it has no trained parameters.
        records: to measure at once. It is one, unless records are short: each pass reads all
            weights, and training should lose little by it.
    """

    def __init__(self, model: nn.Module, num_tokens: int = 0) -> None:
        shared: dict[int, Any] = {}
        for module in model.modules():
            kept = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
            shared |= {id(each): each for each in kept if not _is_structure(each)}
        self._of = trained(model)
        self._own = [nn.Parameter(p.detach().new_empty(0), requires_grad=False) for p in self._of]
        shared |= {id(p): own for p, own in zip(self._of, self._own, strict=True)}
        self.model = copy.deepcopy(model, shared).eval()
        self.records = max(1, _PASS_TOKENS // num_tokens) if num_tokens else 1
        self._pass_bytes = pass_bytes(self.model, self.records * num_tokens)
        self._queue: Any = None
        """The twin's own queue of a GPU, from its first measurement on. In training's, steps would
        wait for what is measured. There is one: the allocator keeps memory for each."""

    @contextlib.contextmanager
    def with_values(self, values: torch.Tensor) -> Iterator[None]:
        """Have the twin compute with these (num_params,) float32, CPU, within the block.

        On a CPU they are not copied, so nobody may change them meanwhile.

        Raises:
            MemoryError: the device has too little memory for them, for a pass, and as much as they
                take for training. A step that ran out of memory because of a joiner would go on
                with fewer records a pass for ever.
        """
        device = self._of[0].device
        self._require_room(device, values.nbytes + self._pass_bytes, values.nbytes)
        try:
            with self._beside(device):
                for own, view in zip(self._own, views(self._of, values), strict=True):
                    own.data = view.to(device)
                yield
        finally:
            for own in self._own:
                own.data = own.new_empty(0)
            if device.type == "cuda":
                torch.cuda.empty_cache()  # what was measured with is training's again

    def _beside(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        if device.type != "cuda":
            return multiplying_elsewhere()
        if self._queue is None:
            self._queue = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(self._queue)

    @staticmethod
    def _require_room(device: torch.device, num_bytes: int, spare: int) -> None:
        """Refuse to measure where `num_bytes`, and `spare` for training, are not free."""
        if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < num_bytes + spare:
            raise MemoryError("the device has no memory for a second set of trained parameters")


def pass_bytes(model: nn.Module, num_tokens: int) -> int:
    """About what a pass of so many tokens, without a backward pass, needs on a GPU: the logits that
    are there at once, and the values of a layer.
    """
    inner = transformers_model(model)
    output = inner.get_output_embeddings()
    widths = [
        getattr(layer, "out_features", getattr(layer, "nf", 0))  # GPT-2's
        for layer in model.modules()
        if layer is not output
    ]
    logits = head.logits_at_once(num_tokens * inner.config.get_text_config().vocab_size)
    return 4 * (_LOGITS * logits + _LAYER * num_tokens * max(widths))


def _is_structure(value: object) -> bool:
    """Whether it is, or may hold, a part that a twin has to have of its own."""
    return value is None or isinstance(value, nn.Module | dict | list | set | tuple | Callable)
