"""Losses on text that no daemon has seen, window by window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from xpeer.training import checkpoint
from xpeer.training.adapters import average
from xpeer.training.flat import write_flat
from xpeer.training.losses import evaluate
from xpeer.training.model import from_folder
from xpeer.training.tensor_file import CorruptFileError

Curve = list[tuple[int, float]]
"""Pairs of private step and loss on everybody's held-out text, in nats per byte."""
BATCH_RECORDS = 64


class HeldOut:
    """Everybody's held-out text, in equal parts.

    Args:
        parts: (n, T) int64 records per kind of text.
        start: Hugging Face folder of the public start.
    """

    def __init__(self, parts: Mapping[str, torch.Tensor], start: Path) -> None:
        fewest = min(len(part) for part in parts.values())
        self._parts = {kind: part[:fewest] for kind, part in parts.items()}
        self._model = from_folder(start)

    @property
    def num_records(self) -> int:
        """Held-out records of all kinds."""
        return sum(len(part) for part in self._parts.values())

    def of_start(self) -> dict[str, float]:
        """Nats per byte of the public start, by kind of text. Call it before `by_kind`."""
        return {
            kind: evaluate(self._model, part, BATCH_RECORDS) for kind, part in self._parts.items()
        }

    def by_kind(self, params: torch.Tensor) -> dict[str, float]:
        """Nats per byte of (P,) parameters, by kind of text."""
        write_flat(self._model, params)
        return self.of_start()

    def loss(self, params: torch.Tensor) -> float:
        """Nats per byte of (P,) parameters on all kinds."""
        return mean(self.by_kind(params))

    def average(self, models: Sequence[torch.Tensor]) -> torch.Tensor:
        """The average of models' (P,) parameters; of adapters, of what they do."""
        return average(self._model, models)


def mean(by_kind: Mapping[str, float]) -> float:
    """Loss on everybody's text: the mean, since all kinds have equally many records."""
    return sum(by_kind.values()) / len(by_kind)


class Snapshots:
    """Collects a running peer's parameters, about once a window, from its checkpoints.

    Args:
        checkpoints: the home's folder of checkpoints.
        every: least number of steps between two snapshots.
    """

    def __init__(self, checkpoints: Path, every: int) -> None:
        self._folder = checkpoints
        self._every = every
        self.kept: list[tuple[int, torch.Tensor]] = []  # (step, (P,) parameters)

    def look(self, *, last: bool = False) -> None:
        """Keep the newest checkpoint's parameters, if `every` steps passed since the last ones.

        Args:
            last: True = the run has ended: keep them in any case.
        """
        newest = next(iter(checkpoint.paths(self._folder)), None)
        if newest is None:
            return
        kept_step = self.kept[-1][0] if self.kept else 0
        step = checkpoint.step_of(newest)
        if step < kept_step + self._every and not last:
            return
        try:
            params = checkpoint.load(newest).flat
        except (FileNotFoundError, CorruptFileError):
            return  # the daemon has just removed it; the next one comes
        if last and step == kept_step:
            self.kept.pop()
        self.kept.append((step, params))

    def curve(self, start: float, held_out: HeldOut) -> Curve:
        """Losses of the snapshots, after the public start's loss."""
        return [(0, start), *((step, held_out.loss(params)) for step, params in self.kept)]

    def last(self) -> torch.Tensor:
        """(P,) parameters at the end.

        Raises:
            FileNotFoundError: there was no checkpoint at all.
        """
        if not self.kept:
            raise FileNotFoundError(self._folder)
        return self.kept[-1][1]
