"""Counts the memory of tensors while code runs, without computing anything.

Inside `Rehearsal` every tensor has a shape and a type, and no values. So the real code of a step
runs for a model of any size in a few seconds. Where code asks for a value, it gets 1 or True.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Final, Self

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_LOG: Final = logging.getLogger("torch._subclasses.fake_tensor")
"""It writes a traceback of each operation that fails, which the caller gets as an error anyway."""


class Rehearsal(TorchDispatchMode):  # type: ignore[no-untyped-call] # torch's
    """Within its `with` block tensors have no values, and their memory is counted.

    Args:
        on_operation: called at each operation, as a sign of life.

    Attributes:
        live_bytes: bytes of all tensors that exist now.
        peak_bytes: the most that `live_bytes` has been since the start, or since `begin`.
    """

    def __init__(self, on_operation: Callable[[], None] = lambda: None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._on_operation = on_operation
        self.live_bytes = self.peak_bytes = 0
        self._storages: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._was_disabled = False
        self._shapes = FakeTensorMode(allow_non_fake_inputs=True)

    def __enter__(self) -> Self:
        """Enter both modes: ours sees each operation first."""
        self._was_disabled, _LOG.disabled = _LOG.disabled, True
        self._shapes.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *reason: Any) -> None:
        """Leave both modes."""
        super().__exit__(*reason)  # type: ignore[no-untyped-call]
        self._shapes.__exit__(*reason)
        _LOG.disabled = self._was_disabled

    def begin(self) -> None:
        """Begin to look for the peak anew."""
        self.peak_bytes = self.live_bytes

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Carry out an operation on shapes; torch calls this for each."""
        self._on_operation()
        if func is torch.ops.aten._local_scalar_dense.default:
            return _value_of(args[0].dtype)
        if func in (torch.ops.aten.equal.default, torch.ops.aten.allclose.default):
            return True
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        key = id(storage)
        known = self._storages.get(key)
        if known is not None and known[0]() is storage:
            return
        size = int(storage.nbytes())
        gone = weakref.ref(storage, lambda _: self._forget(key, size))
        self._storages[key] = gone, size
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, key: int, size: int) -> None:
        self.live_bytes -= size
        self._storages.pop(key, None)


def _value_of(dtype: torch.dtype) -> bool | int | float:
    if dtype is torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1
