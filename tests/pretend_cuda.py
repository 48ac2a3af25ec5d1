"""A GPU for machines without one: tensors say that they are on it, and compute on the CPU.

It stands at the boundary to torch, so that the code that asks for the device is the real one. What
kernels of a GPU would do, it can't show: `make gpu` does.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

CUDA = torch.device("cuda")
_DEVICE = torch.Tensor.device.__get__
_IS_CUDA = torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]


class PretendCuda(TorchFunctionMode):
    """Within its `with` block all tensors are on a GPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (_DEVICE, _IS_CUDA):
            real = _DEVICE(args[0])
            if real.type != "cpu":  # meta
                return func(*args)
            return CUDA if func == _DEVICE else True
        args, kwargs = tree_map(_on_cpu, (args, kwargs or {}))
        return func(*args, **kwargs)


class Largest(TorchFunctionMode):
    """Notes the largest tensor that is made within its `with` block, views of older ones left out.

    Attributes:
        values: of that tensor.
    """

    def __init__(self, *older: torch.Tensor) -> None:
        super().__init__()
        self.values = 0
        self._older = {each.untyped_storage().data_ptr() for each in older}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not self._is_older(out):
            self.values = max(self.values, out.numel())
        return out

    def _is_older(self, tensor: torch.Tensor) -> bool:
        with torch._C.DisableTorchFunction():
            return tensor.untyped_storage().data_ptr() in self._older


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return value


def pretend_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have torch say that there is a GPU, with 24 GB and without bfloat16."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a mode is of one thread
    generator = torch.Generator
    said: dict[str, Any] = {
        "is_available": lambda: True,
        "mem_get_info": lambda _device=None: (20 << 30, 24 << 30),
        "get_device_name": lambda _device=None: "a pretended card",
        "is_bf16_supported": lambda including_emulation=True: False,
        "max_memory_allocated": lambda _device=None: 1 << 30,
        "empty_cache": lambda: None,
    }
    for name, answer in said.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch, "Generator", lambda _device=None: generator())
