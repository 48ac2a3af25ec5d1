"""The benchmark of trainers."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.trainer.pair import COPIES, Memory
from tests.unit.training.homes import make_homes
from xpeer.trainer.build import assemble


def test_exchanges_and_copies_for_checkpoints_are_no_part_of_the_ratio() -> None:
    """They have figures of their own."""
    found = Memory(alone=110, peak=130, saving=140, num_params=5)
    assert (found.own, found.exchange, found.copies) == (50, 20, 60)


def test_what_counts_as_copies_is_what_a_trainer_keeps_for_checkpoints(tmp_path: Path) -> None:
    (setup,) = make_homes(tmp_path, 1)
    made = assemble(setup)
    made.trainer.run(1)
    made.checkpoints.copy()()
    kept = sum(buffer.nbytes for buffer in made.checkpoints._buffers._spare)
    made.close()
    assert kept == pytest.approx(COPIES * made.trainer.parameters.num_params, rel=0.05)
