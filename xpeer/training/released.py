"""Parameters of which nobody sees what a window has learnt before it was released (update mode).

    working   what the steps change; private between a window's first step and its end
    flat      what everybody sees: theta of the last release, and what partners' values added

A merge moves both, so that their difference is what the shard taught in this window and nothing
else. At the window's end the difference is made private, added to `flat`, and the working
parameters start again from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from xpeer.training.flat import FlatParameters

Privatise = Callable[[torch.Tensor], torch.Tensor]
"""(num_params,) float32, which may be overwritten, to what may be shown of it."""


class Released:
    """Stands for the parameters wherever they are shown, saved or merged.

    Args:
        working: of the model.
        privatise: `UpdateMechanism.privatise`.

    Attributes:
        num_params: P.
        flat: (P, padded with zeros to whole lines,) float32, on the model's device: released.
    """

    def __init__(self, working: FlatParameters, privatise: Privatise) -> None:
        self._working = working
        self._privatise = privatise
        self.num_params = working.num_params
        self.flat = working.flat.clone()

    @property
    def followers(self) -> tuple[torch.Tensor, ...]:
        """The working parameters: what is merged is merged into both."""
        return (self._working.flat,)

    def parameters(self) -> list[torch.nn.Parameter]:
        """The working ones, for the optimiser."""
        return self._working.parameters()

    def read(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """Copy what is released to (num_params,) float32 on the CPU, into `out` if given."""
        if out is None:
            out = torch.empty(self.num_params, dtype=torch.float32)
        return out.copy_(self.flat[: self.num_params])

    def write(self, flat: torch.Tensor) -> None:
        """Replace both by (num_params,) float32 from the CPU: the window begins anew."""
        self._working.write(flat)
        self.flat.copy_(self._working.flat)

    def read_gradients(self) -> torch.Tensor:
        """Of the working parameters; private."""
        return self._working.read_gradients()

    def write_gradients(self, flat: torch.Tensor) -> None:
        """Of the working parameters."""
        self._working.write_gradients(flat)

    @contextmanager
    def showing(self, values: torch.Tensor | None = None) -> Iterator[None]:
        """Have the model compute with what is released, or with other values, for a while."""
        with self._working.showing(self.read() if values is None else values):
            yield

    def end_window(self) -> bool:
        """Release the window, and begin the next from there; moments are of what nobody saw."""
        count = self.num_params
        difference = self._working.flat[:count] - self.flat[:count]
        self.flat[:count].add_(self._privatise(difference))
        self._working.flat.copy_(self.flat)
        return True
