"""The registry of conditions, and what is kept of them."""

from __future__ import annotations

import re

import pytest

from xpeer import health
from xpeer.conditions import CONDITIONS, Condition
from xpeer.health import Health, verdict


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tracked(clock: Clock) -> Health:
    return Health(clock)


def codes(tracked: Health) -> list[str]:
    return [reason.code for reason in tracked.reasons()]


@pytest.mark.parametrize("condition", CONDITIONS.values(), ids=CONDITIONS.keys())
def test_every_condition_can_be_told(condition: Condition, tracked: Health, clock: Clock) -> None:
    assert re.fullmatch("[a-z]+(-[a-z]+)*", condition.code)
    assert condition.remedy
    assert condition.clears
    assert set(condition.hides) <= CONDITIONS.keys() - {condition.code}
    tracked.set(condition.code, **dict.fromkeys(condition.facts, 3))
    clock.now += condition.grace_s
    (reason,) = tracked.reasons()
    assert (reason.code, reason.severity) == (condition.code, condition.severity)
    assert not re.search(r"[{}\n]", reason.text)
    assert reason.remedy == condition.remedy
    tracked.clear(condition.code)
    assert tracked.reasons() == []


def test_a_job_that_fails_is_told_from_the_first_time_with_age_count_and_cause(
    tracked: Health, clock: Clock
) -> None:
    for cause in ("first", OSError(28, "No space left on device")):
        tracked.failed("checkpoint-failing", cause)
        clock.now += 65
    (reason,) = tracked.reasons()
    assert "for 2m 10s (2 tried): [Errno 28] No space left" in reason.text
    assert tracked.count("checkpoint-failing") == 2
    tracked.worked("checkpoint-failing")
    assert tracked.reasons() == []
    tracked.failed("checkpoint-failing", TimeoutError())
    assert "for 0s (1 tried): TimeoutError" in tracked.reasons()[0].text


def test_grace(tracked: Health, clock: Clock) -> None:
    tracked.failed("roster-failing", "x")
    clock.now += CONDITIONS["roster-failing"].grace_s - 1
    assert codes(tracked) == []
    clock.now += 1
    assert codes(tracked) == ["roster-failing"]
    tracked.began("roster-failing", clock.now)  # it began anew
    assert codes(tracked) == []


def test_what_follows_from_another_is_hidden_and_the_worst_comes_first(tracked: Health) -> None:
    tracked.set("resting", rest_s=3)
    tracked.set("no-partner")
    assert codes(tracked) == ["no-partner", "resting"]
    tracked.set("sidecar-down")
    assert codes(tracked) == ["sidecar-down", "resting"]
    assert verdict(tracked.reasons()) == "down"


def test_verdict(tracked: Health) -> None:
    assert verdict(tracked.reasons()) == "ok"
    tracked.set("resting", rest_s=3)
    assert verdict(tracked.reasons()) == "ok"
    tracked.set("paused")
    assert verdict(tracked.reasons()) == "degraded"


def test_facts_have_to_fit(tracked: Health) -> None:
    with pytest.raises(TypeError, match="rest_s"):
        tracked.set("resting")
    with pytest.raises(KeyError):
        tracked.clear("nonsense")


def test_a_cause_is_one_line_of_bounded_length(tracked: Health) -> None:
    tracked.failed("log-failing", "a\nb " + "x" * 1000)
    (reason,) = tracked.reasons()
    assert "a b xxx" in reason.text
    assert len(reason.text) < 500


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.9, "0s"), (65, "1m 5s"), (7320, "2h 2m"), (90_000, "1d 1h")],
)
def test_duration(seconds: float, told: str) -> None:
    assert health.duration(seconds) == told
