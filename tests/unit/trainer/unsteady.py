"""A trainer on a device whose products differ from one time to the next, once it takes steps.

Not a test: `python -m tests.unit.trainer.unsteady` in place of `xpeer.trainer.main`.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING

from xpeer.trainer.main import main

if TYPE_CHECKING:
    from torch import Tensor

    from xpeer.trainer.assembled import Assembled
    from xpeer.trainer.setup import TrainerSetup


def assemble(setup: TrainerSetup) -> Assembled:
    """Build the real trainer; then the output layer's gradients are not the same again."""
    from xpeer.privacy import blocks, engines, mechanism
    from xpeer.trainer import build

    vars(blocks)["_CPU_KEPT"] = 0  # else factors of so few tokens are kept
    # by this clock all engines are alike, so that the first one is chosen
    vars(mechanism)["choose_engine"] = partial(engines.choose_engine, clock=lambda: 0.0)
    made = build.assemble(setup)
    assert made.mechanism.engine == "book-keeping"
    real, numbers = blocks._checksum, itertools.count()

    def unsteady(rows: Tensor) -> Tensor:
        return real(rows) + next(numbers)

    vars(blocks)["_checksum"] = unsteady
    return made


if __name__ == "__main__":
    main(assemble)
