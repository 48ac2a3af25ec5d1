"""The benchmark of trainers."""

from __future__ import annotations

from benchmarks.trainer.pair import Memory


def test_arena_and_copies_for_checkpoints_are_no_part_of_the_ratio() -> None:
    """Both are printed beside it."""
    assert Memory(peak=100, arena=20, checkpoint=30, saving=35, num_params=5).own == 50
