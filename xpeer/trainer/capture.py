"""Copies the content of a checkpoint at a step boundary, to be written on another thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from xpeer.errors import LocalError, PeerError, Reason
from xpeer.manifest.model import Frozen
from xpeer.mixing.buffers import Buffers
from xpeer.mixing.cut import padded
from xpeer.mixing.received import ReceivedFragment, packed_addition
from xpeer.privacy.mechanism import Mechanism
from xpeer.training import checkpoint, frozen
from xpeer.training.checkpoint import Bundle, read_moments
from xpeer.training.flat import all_finite
from xpeer.training.loop import TrainingLoop


class FrozenValues:
    """The parameters that no text reaches (`training.frozen`).

    Args:
        model: holds them.
        which: names them; None = there are none.
    """

    def __init__(self, model: torch.nn.Module, which: Frozen | None) -> None:
        self._model = model
        self._which = which
        self._copy: torch.Tensor | None = None
        """The values; None until they are first read, and after `replace`."""

    def read(self) -> torch.Tensor:
        """Return the values, (n,) of the manifest's type, CPU; do not write to them."""
        if self._copy is None:
            self._copy = frozen.values(self._model, self._which)
        return self._copy

    def replace(self, flat: torch.Tensor) -> None:
        """Replace the values by a donor's.

        Raises:
            PeerError: they are not the manifest's (WRONG_MODEL); ours stay.
        """
        try:
            frozen.restore(self._model, self._which, flat)
            self._copy = None
        except LocalError as e:
            raise PeerError(Reason.WRONG_MODEL, e.problem) from e


@dataclass(frozen=True, slots=True)
class Keeping:
    """Where checkpoints are written, and what they belong to."""

    folder: Path
    keep: int
    """Number of checkpoints to keep."""
    ledger_id: str
    """The ledger that the next start needs; empty without privacy."""
    manifest_hash: str


class Capture:
    """Copies and writes checkpoints.

    Args:
        loop: has the parameters, moments and counters.
        mechanism: knows which records were seen.
        frozen_values: of the model.
        keeping: where checkpoints go.
    """

    def __init__(
        self,
        loop: TrainingLoop,
        mechanism: Mechanism,
        frozen_values: FrozenValues,
        keeping: Keeping,
    ) -> None:
        self._loop = loop
        self._mechanism = mechanism
        self._frozen = frozen_values
        self._keeping = keeping
        self._buffers = Buffers(3)

    def beside(self, folder: Path) -> Capture:
        """Checkpoints of the same parts in another folder, which keeps one of them."""
        keeping = replace(self._keeping, folder=folder, keep=1)
        return Capture(self._loop, self._mechanism, self._frozen, keeping)

    def copy(self) -> Callable[[], str]:
        """Copy the content of a checkpoint; at a boundary.

        Returns:
            A function that writes the copy and returns its path; call it on any thread.
        """
        loop = self._loop
        trained = list(loop.parameters.parameters())
        count = loop.parameters.num_params
        own = self._buffers.take(padded(count))
        own[count:] = 0
        moments = [self._buffers.take(count) for _ in range(2)]
        exp_avg, exp_avg_sq, optimiser_step = read_moments(
            loop.learner.optimiser, trained, (moments[0], moments[1])
        )
        bundle = Bundle(
            flat=loop.parameters.read(own[:count]),
            exp_avg=exp_avg,
            exp_avg_sq=exp_avg_sq,
            optimiser_step=optimiser_step,
            rule={name: value.clone() for name, value in loop.exchanges.state().items()},
            seen=self._mechanism.seen,
            frozen=self._frozen.read(),
            counters=loop.counters.to_dict(),
            ledger_id=self._keeping.ledger_id,
            manifest_hash=self._keeping.manifest_hash,
        )
        received = loop.exchanges.consolidation.now()
        return lambda: self._write(bundle, own, received)

    def _write(
        self,
        bundle: Bundle,
        own: torch.Tensor,
        received: dict[int, tuple[ReceivedFragment, ...]],
    ) -> str:
        if not all_finite(bundle.flat):
            raise LocalError(
                f"the parameters of step {bundle.step} are not finite: they are not saved",
                "training diverged; the checkpoint before is kept",
            )
        if received:
            added = packed_addition(own, self._loop.exchanges.fragments, received)
            bundle = replace(bundle, consolidation=added)
        pulse = self._loop.pulse
        pulse.beat()
        folder, keep = self._keeping.folder, self._keeping.keep
        path = str(checkpoint.save(folder, bundle, keep=keep, on_progress=pulse.wrote))
        # memory that is used again makes the next copy faster
        for tensor in (own, bundle.exp_avg, bundle.exp_avg_sq):
            self._buffers.give(tensor)
        return path
