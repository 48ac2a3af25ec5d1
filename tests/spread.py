"""How long `make test` takes with several workers, by the durations that one run reported.

    PYTEST_ADDOPTS="--durations=0 --durations-min=0.02" make test > report
    python -m tests.spread 2 4 8 < report

It repeats what pytest-xdist does with our scopes, and assumes a core for each worker. So it says
what a machine with more cores would take, where there is none to try.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Iterable, Mapping
from typing import Final

from tests.slow import duration_of

SWARMS: Final = "tests/swarm/"


class Scopes:
    """Which tests run one after the other, on the same worker.

    Of several workers half run whole swarms, which wait more than they work, one at a time each.
    The others run what is left, file by file, so that a module's fixtures are made once.

    Args:
        num_workers: of pytest-xdist.
    """

    def __init__(self, num_workers: int) -> None:
        self._lanes = max(1, num_workers // 2)
        self._numbers: dict[str, int] = {}

    def of(self, test: str) -> str:
        """The scope of a test, by its id."""
        file = test.partition("::")[0]
        if not file.startswith(SWARMS):
            return file
        number = self._numbers.setdefault(file, len(self._numbers))
        return f"swarms {number % self._lanes}"


def scopes_of(report: Iterable[str], num_workers: int) -> dict[str, tuple[int, float]]:
    """Tests that took long enough to be reported, and their seconds, by scope."""
    scopes, found = Scopes(num_workers), dict[str, tuple[int, float]]()
    for line in report:
        if (duration := duration_of(line)) is not None:
            test, seconds = duration
            scope = scopes.of(test)
            tests, total = found.get(scope, (0, 0.0))
            found[scope] = tests + 1, total + seconds
    return found


def seconds_with(scopes: Mapping[str, tuple[int, float]], num_workers: int) -> float:
    """When the last worker ends: each takes the scope with the most tests that is left."""
    workers = [0.0] * num_workers
    for _, seconds in sorted(scopes.values(), key=lambda scope: -scope[0]):
        heapq.heapreplace(workers, workers[0] + seconds)
    return max(workers)


def main() -> None:
    """Say it for each number of workers."""
    report = sys.stdin.readlines()
    for num_workers in map(int, sys.argv[1:]):
        scopes = scopes_of(report, num_workers)
        longest = max(scopes, key=lambda name: scopes[name][1])
        print(
            f"{num_workers} workers: {seconds_with(scopes, num_workers):.0f} s; "
            f"the longest scope is {longest}, {scopes[longest][1]:.0f} s"
        )


if __name__ == "__main__":
    main()
