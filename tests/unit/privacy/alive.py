"""Counts the bytes of tensors that are alive, while real code computes with real values."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Alive(TorchDispatchMode):
    """Within its `with` block, memory of tensors that are made there is counted.

    Attributes:
        now, peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if _holds(x)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if _holds(leaf) and id(leaf.untyped_storage()) not in given:
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        key, size = id(storage), int(storage.nbytes())
        if key in self._known:
            return
        self._known[key] = size
        weakref.finalize(storage, self._forget, key)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key)


def _holds(value: object) -> bool:
    return isinstance(value, Tensor) and value.untyped_storage().nbytes() > 0
