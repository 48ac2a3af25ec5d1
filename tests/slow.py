"""Which tests take long: measured, not declared by whoever writes them.

    PYTEST_ADDOPTS="--durations=0 --durations-min=0.02" make test | python -m tests.slow

writes the list that `make quick` leaves out. `make test` runs everything.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

SLOW: Final = Path(__file__).parent / "slow.txt"
LONG_S: Final = 0.3
"""A function is slow if all its cases together, with what they set up, take longer."""
_LINE: Final = re.compile(r"\s*([\d.]+)s (?:call|setup|teardown)\s+(tests/\S+?::.+)$")


def without_parameters(test: str) -> str:
    """A test function's id, of one of its cases."""
    return test.partition("[")[0].strip()


def duration_of(line: str) -> tuple[str, float] | None:
    """A test's id, and the seconds that a part of it took; None = the line says something else."""
    match = _LINE.match(line)
    return (match[2].strip(), float(match[1])) if match else None


def slow_ones(report: Iterable[str]) -> list[str]:
    """Functions that took long, by pytest's list of durations."""
    seconds: dict[str, float] = {}
    for line in report:
        if (duration := duration_of(line)) is not None:
            test = without_parameters(duration[0])
            seconds[test] = seconds.get(test, 0.0) + duration[1]
    return sorted(test for test, took in seconds.items() if took > LONG_S)


def main() -> None:
    """Write the list."""
    SLOW.write_text("\n".join(slow_ones(sys.stdin)) + "\n")


if __name__ == "__main__":
    main()
