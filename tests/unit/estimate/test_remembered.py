"""A restart rehearses nothing again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from xpeer.estimate import remembered
from xpeer.estimate.remembered import NAME, Rehearsals
from xpeer.estimate.step import Step, StepMemory

STEP = Step(config={"a": 1}, sequence_tokens=8, micro_batch=4, private=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    def memory_of(step: Step, _on_operation: object) -> StepMemory:
        return StepMemory(
            num_trained=1, num_frozen=0, weights=1, moments=1, working=step.micro_batch
        )

    monkeypatch.setattr(remembered, "memory_of", memory_of)


def test_the_same_step_is_rehearsed_once(tmp_path: Path) -> None:
    first = Rehearsals(tmp_path / "cache")
    assert first.of(STEP) == first.of(STEP)
    assert first.made == 1
    again = Rehearsals(tmp_path / "cache")
    assert (again.of(STEP), again.made) == (first.of(STEP), 0)
    assert (tmp_path / "cache" / NAME).stat().st_mode & 0o77 == 0


@pytest.mark.parametrize(
    "change", [{"micro_batch": 5}, {"config": {"a": 2}}, {"precision": "bfloat16"}]
)
def test_another_step_is_rehearsed(tmp_path: Path, change: dict[str, object]) -> None:
    Rehearsals(tmp_path).of(STEP)
    other = Rehearsals(tmp_path)
    other.of(replace(STEP, **change))  # type: ignore[arg-type]
    assert other.made == 1
    assert other.of(STEP).working == 4
    assert other.made == 1


def test_another_version_and_damage_mean_a_new_rehearsal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Rehearsals(tmp_path).of(STEP)
    (tmp_path / NAME).write_bytes(b"{")
    damaged = Rehearsals(tmp_path)
    damaged.of(STEP)
    assert damaged.made == 1
    monkeypatch.setattr(remembered, "_version", lambda package: f"{package} 99".encode())
    newer = Rehearsals(tmp_path)
    newer.of(STEP)
    assert newer.made == 1


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    Rehearsals(tmp_path / "cache", writes=False).of(STEP)
    assert not list(tmp_path.iterdir())


def test_only_the_last_ones_are_kept(tmp_path: Path) -> None:
    several = Rehearsals(tmp_path)
    for records in range(1, 20):
        several.of(replace(STEP, micro_batch=records))
    later = Rehearsals(tmp_path)
    later.of(replace(STEP, micro_batch=19))
    assert later.made == 0
    later.of(replace(STEP, micro_batch=1))
    assert later.made == 1
