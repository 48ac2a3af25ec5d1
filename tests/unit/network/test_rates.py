"""How slow a transfer may be."""

from __future__ import annotations

import asyncio
import socket
from typing import Any, cast

import pytest

from xpeer.errors import PeerError, Reason
from xpeer.identity import PeerId
from xpeer.network import bulk, rates
from xpeer.network.rates import LEAST_BYTES_PER_S, Pace, Rates
from xpeer.network.stream import Stream

A, B, C = (PeerId(f"12D3KooW{name}") for name in "ABC")


@pytest.mark.parametrize(
    ("seen", "least"),
    [
        ({}, LEAST_BYTES_PER_S),
        ({B: 1e9}, LEAST_BYTES_PER_S),
        ({B: 50e3, C: 20e3}, 5e3),
        ({A: 300.0, B: 50e3}, 5e3),  # its own word does not lower it
        ({A: 20e3}, 2e3),  # but where nobody else was seen
    ],
)
def test_the_least_rate_follows_from_the_others(seen: dict[PeerId, float], least: float) -> None:
    book = Rates()
    for peer, rate in seen.items():
        book.saw(peer, int(rate * 2), 2.0)
        book.saw(peer, 1 << 40, 0.5)  # in the kernel's buffers
    assert book.least(A) == pytest.approx(least)


def test_a_trickle_ends_though_every_frame_comes_in_time() -> None:
    now_s, frames = 0.0, 0
    pace = Pace(LEAST_BYTES_PER_S, lambda: now_s)
    with pytest.raises(PeerError, match=Reason.TIMEOUT):
        while pace.allows_s(1 << 18):
            now_s, frames = now_s + 14.0, frames + 1
            pace.moved += 1 << 18
    assert frames == 4


def test_what_the_caller_does_with_it_costs_a_transfer_no_time() -> None:
    now_s = 0.0
    pace = Pace(LEAST_BYTES_PER_S, lambda: now_s)
    with pace.resting():
        now_s = 1000.0
    assert (pace.seconds, pace.allows_s(0)) == (0.0, rates.GRACE_S)


def test_a_long_transfer_has_no_end_in_time_as_long_as_it_moves() -> None:
    now_s, size = 0.0, 5 << 30
    pace = Pace(LEAST_BYTES_PER_S, lambda: now_s)
    while pace.moved < size:
        assert pace.allows_s(1 << 18) > 0
        now_s += 1.1 * (1 << 18) / (1.2 * LEAST_BYTES_PER_S)
        pace.moved += 1 << 18
    assert now_s > 20 * 3600


@pytest.mark.parametrize("sends", [True, False])
async def test_bulk_is_broken_off_when_it_is_too_slow(
    monkeypatch: pytest.MonkeyPatch, sends: bool
) -> None:
    monkeypatch.setattr(rates, "GRACE_S", 0.0)
    ours, theirs = socket.socketpair()
    now_s, work = 0.0, cast(Any, bulk.send if sends else bulk.receive)
    stream, pace = Stream(ours), Pace(1e9, lambda: now_s)
    payload, now_s = memoryview(bytearray(1 << 18)), 0.1
    with pytest.raises(PeerError, match=Reason.TIMEOUT):
        await asyncio.wait_for(
            stream.in_thread(lambda: work(stream, Endless(), payload, 60.0, pace)),
            10.0,
        )
    stream.shutdown()
    theirs.close()


class Endless:
    """Seals nothing; opens nothing."""

    def seal_into(self, kind: object, part: memoryview, frame: memoryview) -> int:
        return len(part) + 16
