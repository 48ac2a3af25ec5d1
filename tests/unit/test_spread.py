"""What a machine with more cores would take for the tests."""

from __future__ import annotations

from tests.spread import Scopes, scopes_of, seconds_with

REPORT = """
3.00s call     tests/swarm/test_a.py::test_one
1.00s setup    tests/swarm/test_b.py::test_two
2.00s call     tests/swarm/test_b.py::test_two[a b]
1.00s call     tests/unit/test_c.py::test_three
1.00s call     tests/unit/test_d.py::test_four
(17 durations < 0.02s hidden.)
""".splitlines()


def test_half_of_the_workers_run_swarms_a_file_on_one_of_them() -> None:
    assert scopes_of(REPORT, 2) == {
        "swarms 0": (3, 6.0),
        "tests/unit/test_c.py": (1, 1.0),
        "tests/unit/test_d.py": (1, 1.0),
    }
    four = Scopes(4)
    names = [four.of(f"tests/swarm/test_{x}.py::test") for x in "abab"]
    assert names == ["swarms 0", "swarms 1", "swarms 0", "swarms 1"]
    assert Scopes(1).of("tests/swarm/test_a.py::test") == "swarms 0"


def test_a_worker_takes_the_next_scope_as_soon_as_it_has_none() -> None:
    seconds = [seconds_with(scopes_of(REPORT, workers), workers) for workers in (1, 2, 4)]
    assert seconds == [8.0, 6.0, 3.0]
