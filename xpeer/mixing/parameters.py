"""Protocols: what mixing and the training loop need of the model and of the privacy mechanism."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from xpeer.mixing.fragments import Fragments
from xpeer.update import PrivateUpdate, RawUpdate


class Certifier(Protocol):
    """Certifies values that may leave the node. Only `privacy.mechanism` has the right to."""

    def stamp(self, raw: RawUpdate) -> PrivateUpdate:
        """Certify a snapshot."""


class Parameters(Protocol):
    """A model's parameters as mixing and the loop use them; see `flat.FlatParameters`."""

    @property
    def num_params(self) -> int:
        """P, the number of parameters."""

    @property
    def fragments(self) -> Fragments:
        """How the parameters are cut."""

    def gather(self, fragment: int, out: torch.Tensor) -> torch.Tensor:
        """Copy a fragment to `out`, (size,) float32, CPU; returns it."""

    def add_(self, fragment: int, values: torch.Tensor, scale: float = 1.0) -> None:
        """Add scale times (size,) float32, CPU, to a fragment."""

    def read(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """Copy all parameters, to `out` if given; (num_params,) float32, CPU."""

    def write(self, flat: torch.Tensor) -> None:
        """Replace all parameters by (num_params,) float32, CPU."""

    def read_gradients(self) -> torch.Tensor:
        """Copy all gradients; (num_params padded to whole lines,) float32, CPU."""

    def write_gradients(self, flat: torch.Tensor) -> None:
        """Replace all gradients by a vector of that shape."""

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        """The parameters in flat order."""

    def with_values(self, values: torch.Tensor) -> AbstractContextManager[None]:
        """Have the model compute with these (num_params,) values within the block."""
