"""Losses on text that no daemon has seen, window by window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from xpeer.config import Home
from xpeer.manifest.signed import SignedManifest
from xpeer.training import checkpoint
from xpeer.training.adapters import is_adapted, merged
from xpeer.training.checkpoint_files import paths, step_of
from xpeer.training.flat import read_flat, write_flat
from xpeer.training.held import release
from xpeer.training.initial import model_of, saved_model, trained_model
from xpeer.training.losses import evaluate
from xpeer.training.tensor_file import CorruptFileError

Curve = list[tuple[int, float]]
"""Pairs of private step and loss on everybody's held-out text, in nats per token. The tokens of
the demo's own model are bytes."""
BATCH_RECORDS = 64


class HeldOut:
    """Everybody's held-out text, in equal parts.

    Args:
        parts: (n, T) int64 records per kind of text.
        model: the public start; `by_kind` changes its parameters.
    """

    def __init__(self, parts: Mapping[str, torch.Tensor], model: torch.nn.Module) -> None:
        fewest = min(len(part) for part in parts.values())
        self.parts = {kind: part[:fewest] for kind, part in parts.items()}
        self.model = model

    def of_swarm(self, home: Home, base_model: str) -> HeldOut:
        """The same text, for the parameters of a node: the whole model's, or those of adapters.

        Args:
            home: of a node.
            base_model: see `model_of`.
        """
        manifest = SignedManifest.load(home.manifest).open()
        return HeldOut(self.parts, model_of(manifest, home, base_model))

    @property
    def num_records(self) -> int:
        """Held-out records of all kinds."""
        return sum(len(part) for part in self.parts.values())

    def of_start(self) -> dict[str, float]:
        """Nats per token of the public start, by kind of text. Call it before `by_kind`."""
        return {
            kind: evaluate(self.model, part, BATCH_RECORDS) for kind, part in self.parts.items()
        }

    def by_kind(self, params: torch.Tensor) -> dict[str, float]:
        """Nats per token of (P,) parameters, by kind of text."""
        self.take(params)
        return self.of_start()

    def take(self, params: torch.Tensor) -> None:
        """Give the model (P,) parameters."""
        write_flat(self.model, params)

    def loss(self, params: torch.Tensor) -> float:
        """Nats per token of (P,) parameters on all kinds."""
        return mean(self.by_kind(params))


def average_of(homes: Sequence[Home], base_model: str) -> torch.Tensor:
    """The exact average of whole models, (P,) float32. Adapters are added to the weights first.

    Adapters that were trained apart have factors of their own, whose average is no average of what
    they do.

    Args:
        homes: of nodes that have saved.
        base_model: see `model_of`.
    """
    total = torch.zeros(0)
    for number, home in enumerate(homes):
        model = trained_model(
            SignedManifest.load(home.manifest).open(), home, base_model, saved_model(home)[0]
        )
        if is_adapted(model):
            model = merged(release(model))
        flat = read_flat(model.requires_grad_(True))
        total = flat if number == 0 else total.add_(flat)
    return total / len(homes)


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
        newest = next(iter(paths(self._folder)), None)
        if newest is None:
            return
        kept_step = self.kept[-1][0] if self.kept else 0
        step = step_of(newest)
        if step < kept_step + self._every and not last:
            return
        try:
            params = checkpoint.load(newest).flat
        except (FileNotFoundError, CorruptFileError):
            return  # the daemon has just removed it; the next one comes
        if last and step == kept_step:
            self.kept.pop()
        self.kept.append((step, params))

    def curve(self, start: float, held_out: HeldOut, end: float) -> Curve:
        """Losses of the snapshots, after the public start's loss.

        Args:
            start: the public start's loss.
            held_out: measures.
            end: the last snapshot's loss, which is known already.
        """
        between = [(step, held_out.loss(params)) for step, params in self.kept[:-1]]
        return [(0, start), *between, (self.kept[-1][0], end)]

    def last(self) -> torch.Tensor:
        """(P,) parameters at the end.

        Raises:
            FileNotFoundError: there was no checkpoint at all.
        """
        if not self.kept:
            raise FileNotFoundError(self._folder)
        return self.kept[-1][1]
