"""D42: record mode with 6 records a step learns nothing, and nothing said so."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cases.support import LOOPBACK, sets, xpeer

pytestmark = pytest.mark.timeout(240)
PLAN = ("privacy", "plan", "--epsilon", "8", "--records", "2000", "--parameters", "1832640")
"""Of the preset small."""


def test_six_records_a_step_are_warned_of(tmp_path: Path, shard: Path) -> None:
    done = xpeer(
        "init", "--swarm", "s", "--home", tmp_path / "h", "--preset", "small", "--shard", shard,
        "--listen", LOOPBACK, *sets("optimiser.batch_records=6", "end.steps=200"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "next to nothing is learnt" in done.stderr
    assert "optimiser.batch_records" in done.stderr
    done = xpeer(*PLAN, "--batch", "6", "--steps", "200")
    assert "next to nothing is learnt" in done.stderr


def test_the_demos_own_setting_is_not_warned_of() -> None:
    done = xpeer(*PLAN, "--batch", "48", "--steps", "35")
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
