"""How a trainer's end is told."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from xpeer.trainer import ended
from xpeer.trainer.ended import Ended, TrainerKilledError, kills_so_far


@pytest.mark.parametrize(
    ("end", "words"),
    [
        (Ended(0), "exited with 0"),
        (Ended(3), "exited with 3"),
        (Ended(-signal.SIGSEGV), "was ended by SIGSEGV"),
        (Ended(-signal.SIGKILL, by_us=True, kills=1), "was ended by SIGKILL"),
        (Ended(-(signal.SIGRTMIN + 1)), f"was ended by signal {signal.SIGRTMIN + 1}"),
        (Ended(-signal.SIGKILL), "the system does so where memory runs out"),
        (Ended(-signal.SIGKILL, kills=1), "the kernel has ended a process for want of memory"),
        (Ended(-signal.SIGKILL, kills=2), "the kernel has ended 2 processes for want of memory"),
    ],
)
def test_every_end_has_words(end: Ended, words: str) -> None:
    assert words in str(end)
    killed = end.status == -signal.SIGKILL and not end.by_us
    assert end.was_killed == killed
    assert isinstance(end.error(), TrainerKilledError) == killed
    assert ("micro_batch" in end.error().remedy) == killed


def test_the_kernels_count_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "vmstat"
    monkeypatch.setattr(ended, "_COUNTERS", file)
    assert kills_so_far() == 0, "another system has no such file"
    file.write_text("nr_free_pages 7\noom_kill 4\nnuma_hit 9\n")
    assert kills_so_far() == 4
    file.write_text("nr_free_pages 7\n")
    assert kills_so_far() == 0
