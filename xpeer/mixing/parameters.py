"""What mixing needs of the model and of the privacy mechanism, and the loop of the model."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Protocol

import torch

from xpeer.mixing.fragments import Fragments
from xpeer.update import PrivateUpdate, RawUpdate


class Certifier(Protocol):
    """Says that values may leave the node; `privacy.mechanism` alone can."""

    def stamp(self, raw: RawUpdate) -> PrivateUpdate:
        """Certify a snapshot."""


class Parameters(Protocol):
    """`flat.FlatParameters`, as the loop uses it."""

    @property
    def num_params(self) -> int:
        """P."""

    @property
    def fragments(self) -> Fragments:
        """How they are cut."""

    def gather(self, fragment: int, out: torch.Tensor) -> torch.Tensor:
        """Copy a fragment to `out`, (size,) float32, CPU; returns it."""

    def add_(self, fragment: int, values: torch.Tensor, scale: float = 1.0) -> None:
        """Add scale times (size,) float32, CPU, to a fragment."""

    def read(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """(num_params,) float32, CPU."""

    def write(self, flat: torch.Tensor) -> None:
        """Replace all."""

    def read_gradients(self) -> torch.Tensor:
        """(num_params padded to whole lines,) float32, CPU: a copy."""

    def write_gradients(self, flat: torch.Tensor) -> None:
        """Replace all."""

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        """In flat order."""

    def with_values(self, values: torch.Tensor) -> AbstractContextManager[None]:
        """For the time being the model computes with these (num_params,) values."""
