"""What follows from a step's memory and the exchange."""

from __future__ import annotations

from typing import Any

import pytest

from xpeer.estimate.phases import (
    PROCESS,
    Phase,
    Wire,
    donor_bytes,
    host_bytes,
    phases_of,
    slack,
)
from xpeer.estimate.step import StepMemory
from xpeer.forms import Form
from xpeer.manifest import LARGE_STATE


@pytest.mark.parametrize(
    ("trained", "codec", "each"),
    [(LARGE_STATE - 64, "int8", 4), (LARGE_STATE, "int8", 2), (LARGE_STATE, "float32", 4)],
)
def test_a_joiner_gets_as_many_bytes_as_members_send(trained: int, codec: str, each: int):
    step = StepMemory(num_trained=trained, num_frozen=0, weights=1, moments=1, working=1)
    wire = Wire(fragments=1, codec=codec)
    found = {p.name: p for p in phases_of(step, wire, 2, private=False, on_cpu=False)}
    assert found["join"].wire == each * trained
    assert found["exchange"].wire == Form(codec, trained).num_bytes
    assert found["join"].wire_s is None


def rows(
    step: StepMemory, *, private: bool = True, on_cpu: bool = False, **wire: object
) -> dict[str, Phase]:
    options: dict[str, Any] = {"fragments": 5, "codec": "int8", **wire}
    found = phases_of(step, Wire(**options), 2, private=private, on_cpu=on_cpu)
    return {p.name: p for p in found}


def full(count: int, working: int = 0) -> StepMemory:
    """A step of a model of which all weights are trained."""
    return StepMemory(
        num_trained=count, num_frozen=0, weights=4 * count, moments=8 * count, working=working
    )


def test_a_start_needs_the_device_for_its_self_test() -> None:
    """Sums of several engines are there at once, so the weights alone are not enough."""
    step = full(1000, working=5000)
    assert rows(step)["start"].device == max(step.peak, 16 * 1000)
    assert rows(step, private=False)["start"].device == step.weights
    assert rows(full(1000))["start"].device == 16 * 1000


def test_a_processor_keeps_freed_memory_besides() -> None:
    small, large = full(10**6, working=10**6), full(10**9, working=10**11)
    assert rows(small, on_cpu=True)["step"].slack == slack(small) == small.working
    assert 0 < rows(large, on_cpu=True)["step"].slack < large.working
    assert not any(row.slack for row in rows(large).values())


def test_a_founders_trial_needs_a_device_as_a_step_does_and_a_host_as_a_checkpoint() -> None:
    step = full(10**6, working=5000)
    found = rows(step)["init"]
    assert found.device == step.peak
    assert found.host - PROCESS == 20 * 10**6  # as benchmarks/memory measured it
    assert found.disk >= (4 + 13 + 4) * 10**6  # initial model, checkpoint, export


def test_a_donor_holds_copies_for_joiners_besides_those_of_checkpoints() -> None:
    lines, other, large = 10**6 - 64, 10**6 - 1, LARGE_STATE
    for count, codec, each, apart in (
        (lines, "int8", 4, 0),
        (other, "int8", 4, 4),
        (large, "int8", 2, 0),
        (large, "float32", 4, 0),
    ):
        found = rows(full(count), codec=codec)["donate"]
        # for checkpoints, shared with the daemon, averaged apart, and two donations in the daemon
        assert found.host - PROCESS == (12 + 4 + apart + 2 * each) * count
        assert found.wire == each * count
        assert donor_bytes(count, Wire(fragments=5, codec=codec)) == found.host


@pytest.mark.parametrize("frozen", [0, 10**9])
def test_an_export_holds_no_second_model(frozen: int) -> None:
    count = 10**6
    step = StepMemory(
        num_trained=count, num_frozen=frozen, weights=4 * count + 2 * frozen, moments=1, working=1
    )
    assert rows(step)["export"].host - PROCESS <= 9 * count + 0.8 * frozen


def test_codes_are_made_on_the_host() -> None:
    rule = Wire(fragments=1, codec="int8").rule
    least = host_bytes(1000, rule)
    assert host_bytes(1000, rule, codes=10**9) - least == 7 * 1000 + 10**9 - 12 * 1000
