"""An event loop that is held up is named, with since when and by what."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path

import pytest

from tests.unit.daemon.fakes import ALPHA, Clock, FakeNode
from xpeer.config import Home
from xpeer.health import Health
from xpeer_daemon import lag, watch
from xpeer_daemon.lag import Lag, Look


def looks(clock: Clock, *late_s: float, busy: float = 0.0) -> Health:
    """One every two seconds."""
    health = Health(clock)
    measured = Lag(health, clock)
    for late in late_s:
        clock.now += watch.EVERY_S
        measured.add(Look(clock.now, late, busy * late))
    return health


@pytest.mark.parametrize(
    ("late_s", "since_s"),
    [
        ((0.0, 0.0, 0.0, 0.0, 0.0), None),
        ((5.0, 5.0), None),
        ((0.09,) * 9, None),
        ((0.3, 0.0, 0.0, 0.3, 0.0, 0.0, 0.3), None),
        ((0.0, 0.3, 0.2, 0.2), 4.0),
        ((0.3, 0.0, 0.3, 0.0, 0.3), 8.0),  # every other look
        ((0.3, 0.3, 0.3, 0.0, 0.0, 0.0, 0.0), 12.0),
        ((0.3, 0.3, 0.3, 0.0, 0.0, 0.0, 0.0, 0.0), None),
    ],
)
def test_several_late_looks_show_from_the_first_and_until_none_is_late(
    late_s: tuple[float, ...], since_s: float | None
) -> None:
    told = looks(Clock(), *late_s).reasons()
    assert [reason.code for reason in told] == ([] if since_s is None else ["loop-late"])
    if since_s is not None:
        assert told[0].text.startswith(
            f"the daemon has woken its tasks late for {since_s:.0f}s, by up to 300 ms: "
        )


@pytest.mark.parametrize(("busy", "why"), [(0.9, lag.OWN_WORK), (0.1, lag.WAITED)])
def test_the_cause_is_what_the_loop_did_meanwhile(busy: float, why: str) -> None:
    (reason,) = looks(Clock(), 0.2, 0.2, 0.2, busy=busy).reasons()
    assert reason.text.endswith(f": {why}")


async def test_what_blocks_the_real_loop_is_seen_by_the_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moment, node = Clock(), FakeNode(ALPHA).node
    measured = functools.partial(Lag, moment=moment, busy=lambda: 0.0)
    monkeypatch.setattr(watch, "Lag", measured)
    monkeypatch.setattr(lag, "TICK_S", 0.0)  # each turn of the loop
    watching = asyncio.create_task(watch.keep_watching(node, Home(tmp_path)))

    def told() -> bool:
        return "loop-late" in {reason.code for reason in node.reasons()}

    async with asyncio.timeout(20):
        while not told():
            moment.now += 0.25  # a long encode, or a write to a slow disk
            await asyncio.sleep(0)
    watching.cancel()
