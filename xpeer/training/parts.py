"""What the training loop needs of the model, the privacy mechanism and the texts; no more."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch

from xpeer.privacy.steps import Charged
from xpeer.status import PrivacySpent
from xpeer.training.fragments import Fragments
from xpeer.update import PrivateUpdate, RawUpdate


class StepResult(Protocol):
    """What a private step tells; never leaves the node."""

    @property
    def loss(self) -> float | None:
        """Mean loss per token; None for an empty batch."""

    @property
    def tokens(self) -> int:
        """In the batch."""

    @property
    def clip_norm(self) -> float | None:
        """Of the next step, where it follows what steps release: kept in checkpoints."""


class Mechanism(Protocol):
    """`privacy.Mechanism`, as the loop uses it."""

    def begin_window(self, steps: int) -> int:
        """Charge steps durably; how many may be taken."""

    def prepare_window(self, steps: int) -> None:
        """Begin to charge the next window in the background."""

    def charged(self) -> Charged:
        """What was charged in this process, and what became of it."""

    def step_gradient(self) -> StepResult:
        """Set every parameter's gradient; uses up one charged step."""

    def stamp(self, raw: RawUpdate) -> PrivateUpdate:
        """Certify a snapshot."""

    def spent(self) -> PrivacySpent:
        """The ledger's answer."""


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

    def showing(self, values: torch.Tensor) -> AbstractContextManager[None]:
        """For the time being the model computes with these (num_params,) values."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Losses in nats per token, measured on demand."""

    public: Callable[[], float]
    """On the manifest's public text."""
    validation: Callable[[], float] | None = None
    """On held-out text of the shard. Local only."""
