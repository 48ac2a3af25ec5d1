"""What follows from a step's memory and the exchange."""

from __future__ import annotations

import pytest

from xpeer.estimate.phases import Wire, phases_of
from xpeer.estimate.step import StepMemory
from xpeer.forms import Form
from xpeer.manifest import LARGE_STATE


@pytest.mark.parametrize(
    ("trained", "codec", "each"),
    [(LARGE_STATE - 64, "int8", 4), (LARGE_STATE, "int8", 2), (LARGE_STATE, "float32", 4)],
)
def test_a_joiner_gets_as_many_bytes_as_members_send(trained: int, codec: str, each: int):
    step = StepMemory(num_trained=trained, num_frozen=0, weights=1, moments=1, working=1)
    found = {p.name: p for p in phases_of(step, Wire(fragments=1, codec=codec), 2)}
    assert found["join"].wire == each * trained
    assert found["exchange"].wire == Form(codec, trained).num_bytes
    assert found["join"].wire_s is None
