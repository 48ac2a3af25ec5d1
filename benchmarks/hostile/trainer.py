"""The trainer process of a hostile member: the real one, but for what it shows its partners, or for
when it merges.
"""

from __future__ import annotations

import os
from collections import deque

import torch

from benchmarks.hostile.attacks import ATTACK_VARIABLE, LATE, SHOWN, Shown
from xpeer.accounts.budget import Charged
from xpeer.privacy.mechanism import Mechanism
from xpeer.privacy.steps import StepResult
from xpeer.status import PrivacySpent
from xpeer.trainer import build as production
from xpeer.trainer.assembled import Assembled
from xpeer.trainer.main import main
from xpeer.trainer.setup import TrainerSetup
from xpeer.training.loop import TrainingLoop
from xpeer.update import PrivateUpdate, RawUpdate

STEPS_LATE = 4


class Liar:
    """A mechanism that certifies what an attack makes of a snapshot.

    Args:
        real: does the rest.
        attack: what is shown instead.
    """

    def __init__(self, real: Mechanism, attack: Shown) -> None:
        self.engine, self.notes = real.engine, real.notes
        self._real, self._attack = real, attack

    @property
    def seen(self) -> torch.Tensor:
        """See `Mechanism`."""
        return self._real.seen

    def charge_until(self, steps: int) -> int:
        """See `Mechanism`."""
        return self._real.charge_until(steps)

    def charge_ahead(self, steps: int) -> None:
        """See `Mechanism`."""
        self._real.charge_ahead(steps)

    def charged(self) -> Charged:
        """See `Mechanism`."""
        return self._real.charged()

    def step_gradient(self) -> StepResult:
        """See `Mechanism`."""
        return self._real.step_gradient()

    def stamp(self, raw: RawUpdate) -> PrivateUpdate:
        """Of other values."""
        return self._real.stamp(RawUpdate(self._attack(raw.values), raw.step))

    def spent(self) -> PrivacySpent:
        """See `Mechanism`."""
        return self._real.spent()

    def close(self) -> None:
        """See `Mechanism`."""
        self._real.close()


def put_off(trainer: TrainingLoop, steps: int) -> None:
    """While it trains, merge everything so many steps after it was resolved."""
    merge, boundary = trainer.merge, trainer._boundary
    waiting: deque[tuple[int, int]] = deque()

    def later(meeting_id: int) -> None:
        waiting.append((trainer.counters.step + steps, meeting_id))

    def merge_what_is_due() -> None:
        boundary()
        while waiting and (waiting[0][0] <= trainer.counters.step or trainer.state != "training"):
            merge(waiting.popleft()[1])

    trainer.merge = later  # type: ignore[method-assign]
    trainer._boundary = merge_what_is_due  # type: ignore[method-assign]


def assemble(setup: TrainerSetup) -> Assembled:
    """The production's trainer; its exchanges show what the attack says."""
    assembled = production.assemble(setup)
    if os.environ[ATTACK_VARIABLE] == LATE:
        put_off(assembled.trainer, STEPS_LATE)
    if (attack := SHOWN.get(os.environ[ATTACK_VARIABLE])) is not None:
        liar = Liar(assembled.mechanism, attack())
        assembled.trainer.exchanges._mechanism = liar
    return assembled


if __name__ == "__main__":
    main(assemble)
