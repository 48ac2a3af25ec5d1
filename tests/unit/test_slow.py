"""The list that `make quick` leaves out."""

from __future__ import annotations

from pathlib import Path

from tests.slow import SLOW, slow_ones, without_parameters

ROOT = Path(__file__).parents[2]
REPORT = """
0.21s call     tests/unit/a.py::test_many[one]
0.01s setup    tests/unit/a.py::test_many[two words]
0.20s call     tests/unit/a.py::test_many[two words]
0.29s call     tests/unit/a.py::test_quick
9.00s teardown tests/unit/b.py::test_ends_late
(17 durations < 0.02s hidden.)
""".splitlines()


def test_cases_of_one_function_and_their_setup_count_together() -> None:
    assert slow_ones(REPORT) == ["tests/unit/a.py::test_many", "tests/unit/b.py::test_ends_late"]
    assert without_parameters("tests/unit/a.py::test_many[a[0]]") == "tests/unit/a.py::test_many"


def test_what_is_left_out_is_there() -> None:
    """A test that was renamed would run in `make quick`, however long it takes."""
    for test in SLOW.read_text().split():
        path, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / path).read_text(), test
