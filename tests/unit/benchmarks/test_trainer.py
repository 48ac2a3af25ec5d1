"""The benchmark of trainers."""

from __future__ import annotations

from benchmarks.trainer.pair import Memory


def test_exchanges_and_copies_for_checkpoints_are_no_part_of_the_ratio() -> None:
    """Both are printed beside it."""
    found = Memory(alone=110, peak=130, saving=140, num_params=5)
    assert (found.own, found.exchange, found.copies) == (50, 20, 60)
