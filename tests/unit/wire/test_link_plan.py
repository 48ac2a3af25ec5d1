from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xpeer.errors import LocalError
from xpeer.forms import Form
from xpeer.wire.link_plan import (
    IN_FLIGHT,
    LONG_WINDOW_STEPS,
    MAX_FRAGMENTS,
    ROUND_TRIPS,
    SHARE,
    Bandwidth,
    plan,
)

bandwidths = st.floats(1e4, 1e12)
round_trips = st.floats(0, 2)
sizes = st.integers(1, 10**11)
steps = st.floats(1e-3, 1e3)
swarms = st.integers(1, 4096)


@given(bandwidths, round_trips, sizes, steps, swarms)
def test_the_budget_is_never_exceeded(
    bits_per_s: float, round_trip_s: float, num_params: int, step_s: float, peers: int
) -> None:
    link = Bandwidth(bits_per_s, round_trip_s)
    chosen = plan(link, num_params=num_params, step_s=step_s, peers=peers)
    assert 1 <= chosen.fragments <= min(MAX_FRAGMENTS, num_params)
    assert chosen.window_steps % chosen.fragments == 0
    window_s = chosen.window_steps * step_s
    largest = -(-num_params // chosen.fragments)
    payload_s = 8 * Form(chosen.codec, largest).num_bytes / bits_per_s
    assert payload_s * chosen.fragments <= SHARE * window_s * (1 + 1e-9)
    assert chosen.exchange_s == payload_s + ROUND_TRIPS * round_trip_s
    assert chosen.exchange_s <= SHARE * window_s * (1 + 1e-9)
    assert chosen.exchange_s <= IN_FLIGHT * chosen.slot_s * (1 + 1e-9)
    assert chosen.link_share <= SHARE * (1 + 1e-9)
    assert chosen.codec in {"int8", "int4"}
    assert f"{chosen.window_steps} steps" in chosen.why


@given(bandwidths, st.floats(1, 1000), round_trips, sizes, steps)
def test_a_faster_link_never_means_less(
    bits_per_s: float, times: float, round_trip_s: float, num_params: int, step_s: float
) -> None:
    """Never a coarser codec; with the same codec, never a longer window."""
    slow = plan(Bandwidth(bits_per_s, round_trip_s), num_params=num_params, step_s=step_s, peers=4)
    link = Bandwidth(bits_per_s * times, round_trip_s)
    fast = plan(link, num_params=num_params, step_s=step_s, peers=4)
    assert Form(fast.codec, num_params).num_bytes >= Form(slow.codec, num_params).num_bytes
    if fast.codec == slow.codec:
        assert fast.window_steps <= slow.window_steps


def test_a_million_parameters_exchange_a_fifth_at_every_step() -> None:
    chosen = plan(Bandwidth(100e6), num_params=1_000_000, step_s=1.0, peers=4)
    assert (chosen.fragments, chosen.window_steps, chosen.codec) == (5, 5, "int8")
    assert chosen.slot_s == 1.0


def test_smollm_over_100_mbit() -> None:
    """134.5 M parameters in int8 are 10.9 s of 100 Mbit/s: at half of it, 22 steps of a second."""
    chosen = plan(Bandwidth(100e6), num_params=134_515_008, step_s=1.0, peers=8)
    assert (chosen.fragments, chosen.window_steps, chosen.codec) == (22, 22, "int8")
    assert chosen.why == (
        "134,515,008 parameters are 136.6 MB in int8, 10.9 s at 100 Mbit/s: sent as 22 fragments, "
        "one every step (1 s), an exchange takes 0.647 s, the link is busy 50% of the time, and "
        "each parameter is exchanged every 22 steps (22 s). Among 8 peers news needs about 3 such "
        "windows to reach everybody."
    )


def test_a_slow_link_gets_int4_and_a_hopeless_one_says_so() -> None:
    slow = plan(Bandwidth(1e6), num_params=50_000_000, step_s=1.0, peers=2)
    assert slow.codec == "int4"
    assert "int8 would need more" in slow.why
    hopeless = plan(Bandwidth(1e5), num_params=10**9, step_s=1.0, peers=2)
    assert hopeless.window_steps > LONG_WINDOW_STEPS
    assert "LoRA" in hopeless.why


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_arguments_that_are_no_positive_numbers(bad: float) -> None:
    with pytest.raises(LocalError, match="bandwidth"):
        plan(Bandwidth(bad), num_params=10, step_s=1.0, peers=2)
    with pytest.raises(LocalError, match="step time"):
        plan(Bandwidth(1e6), num_params=10, step_s=bad, peers=2)
    with pytest.raises(LocalError, match="peers"):
        plan(Bandwidth(1e6), num_params=10, step_s=1.0, peers=0)
    if not bad >= 0 or bad == float("inf"):
        with pytest.raises(LocalError, match="round trip"):
            plan(Bandwidth(1e6, bad), num_params=10, step_s=1.0, peers=2)
