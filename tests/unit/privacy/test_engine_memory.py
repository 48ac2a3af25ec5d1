"""The choice of an engine is remembered, and held against autograd all the same."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.unit.privacy.models import llama, record_losses, some_records
from xpeer.privacy import engines
from xpeer.privacy.clipping import Bound, Clipped, MicrobatchEngine
from xpeer.privacy.engine_memory import NAME, EngineMemory, setting_of
from xpeer.privacy.engines import choose_engine


class Timed(MicrobatchEngine):
    """Right unless told otherwise, and as slow as it is told."""

    def __init__(self, bench: Bench, name: str) -> None:
        super().__init__(bench.model, record_losses)
        self.name, self.bench = name, bench

    def accumulate(self, records: Tensor, clip_norm: Bound, sums: Sequence[Tensor]) -> Clipped:
        self.bench.runs[self.name] = self.bench.runs.get(self.name, 0) + len(records)
        timed = len(records) == 8
        factor = self.bench.slowed.pop(0) if timed and self.name == "b" and self.bench.slowed else 1
        self.bench.now += factor * self.bench.seconds[self.name] * len(records)
        told = super().accumulate(records, clip_norm, sums)
        if self.name == self.bench.wrong:
            for total in sums:
                total.mul_(1.01)
        return told


class Bench:
    """A model, and engines whose speeds change from start to start."""

    def __init__(self) -> None:
        self.model = llama(tied=True)
        self.seconds = {"a": 3.0, "b": 2.0, "c": 100.0, "one": 9.0}
        self.wrong, self.now = "", 0.0
        self.runs: dict[str, int] = {}
        self.slowed: list[float] = []
        """By how much other processes slow the first timed passes of engine b."""

    def choose(self, memory: EngineMemory | None) -> str:
        self.runs.clear()
        return choose_engine(
            self.model, record_losses, some_records()[:4],
            candidates=[partial(Timed, self, name) for name in "abc"],
            clock=lambda: self.now, memory=memory,
        ).engine.name  # fmt: skip


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench()
    reference = Timed(made, "one")
    monkeypatch.setattr("xpeer.privacy.engine_check.MicrobatchEngine", lambda *_: reference)
    return made


def test_the_choice_of_the_first_start_is_that_of_all(bench: Bench, tmp_path: Path) -> None:
    memory = EngineMemory(tmp_path / "cache", "this")
    assert bench.choose(memory) == "b"
    bench.seconds["a"] = 0.1  # timing noise
    assert bench.choose(memory) == "b"
    assert "a" not in bench.runs
    assert "c" not in bench.runs
    assert bench.runs["b"] == 8  # it was compared, and tried in training mode
    assert bench.choose(None) == "a"


def test_one_that_is_wrong_today_is_not_taken(bench: Bench, tmp_path: Path) -> None:
    memory = EngineMemory(tmp_path, "this")
    bench.choose(memory)
    bench.wrong = "b"
    assert bench.choose(memory) == "a"
    bench.wrong = ""
    assert bench.choose(memory) == "a"  # which is remembered now


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b"null",
        b'{"setting":"this","engine":"unheard of","reason":""}',
        b'{"setting":"this","engine":"opacus","reason":"of a version that had it"}',
    ],
)
def test_a_memory_that_makes_no_sense_is_made_again(
    bench: Bench, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / NAME).write_bytes(content)
    memory = EngineMemory(tmp_path, "this")
    assert bench.choose(memory) == "b"
    assert memory.recall() is not None
    assert "a" in bench.runs


def test_a_memory_that_cannot_be_written_costs_time_alone(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    assert bench.choose(EngineMemory(tmp_path, "this")) == "b"


def test_one_far_behind_is_given_up(bench: Bench) -> None:
    bench.choose(None)
    assert bench.runs["c"] == 4 + 2  # compared; then two records of eight
    assert bench.runs["b"] == 4 + 2 + 8


def test_a_setting_is_of_model_batch_and_details() -> None:
    records = torch.zeros(3, 8, dtype=torch.int64)
    model = llama(tied=True)
    known = setting_of(model, records, "record", 8)
    assert known == setting_of(llama(tied=True), records[:1], "record", 8)
    other: nn.Module = llama(tied=False)
    assert known != setting_of(other, records, "record", 8)
    assert known != setting_of(model, records[:, :4], "record", 8)
    assert known != setting_of(model, records, "record", 9)
    next(model.parameters()).requires_grad_(False)
    assert known != setting_of(model, records, "record", 8)


def test_a_pass_that_others_slowed_does_not_decide(bench: Bench) -> None:
    """An engine that a busy moment chose would be remembered."""
    bench.seconds = dict.fromkeys(bench.seconds, 0.01) | {"b": 0.001}
    bench.slowed = [20.0, 15.0]
    assert bench.choose(None) == "b"
    bench.slowed = [20.0, 15.0, 20.0]
    assert bench.choose(None) == "a"


def test_where_one_thread_computes_its_own_seconds_count(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, threads = torch.device("cpu"), torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert engines._clock_of(cpu) is time.thread_time
    assert engines._clock_of(torch.device("cuda")) is time.perf_counter
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    assert engines._clock_of(cpu) is time.perf_counter
