"""The joining benchmark's arithmetic: what came to a joiner, and what its donors used meanwhile."""

import pytest

from benchmarks.joining.figures import (
    Came,
    Row,
    around,
    in_step,
    spent,
    summary_of,
    transfer,
    usual_distance,
)


def row(at, **used):
    return Row(**{**dict.fromkeys(Row.__dataclass_fields__, 0), "at": at, **used})


def test_a_piece_that_came_twice_counts_once():
    came = transfer(
        [
            Came(10.0, None, 0, "a"),
            Came(10.1, None, 0, "b"),
            Came(11.0, 0, 1_000_000, "a"),
            Came(12.0, 1, 500_000, "b"),
            Came(14.0, 1, 500_000, "a"),
        ]
    )
    assert (came.pieces, came.num_bytes, came.pieces_twice) == (2, 1_500_000, 1)
    assert came.by_donor == {"a": 2, "b": 1}
    assert came.mbit_per_s == pytest.approx(12 / 4)


def test_whole_steps_cover_a_time_as_far_as_there_are_any():
    rows = [row(float(at)) for at in (0, 10, 20, 30)]
    assert [r.at for r in around(rows, 12.0, 19.0)] == [10, 20]
    assert [r.at for r in around(rows, 10.0, 21.0)] == [10, 20, 30]
    assert [r.at for r in around(rows, -5.0, 99.0)] == [0, 10, 20, 30]


def test_what_a_donor_used_between_two_rows():
    used = spent(
        [
            row(100.0, step=5, tokens=500, cpu_s=50.0, copies=1, copy_cpu_s=1.0),
            row(110.0, step=7, tokens=700, cpu_s=54.0, copies=2, copy_cpu_s=1.2, copy_s=0.1,
                copy_waits=1),
        ]
    )  # fmt: skip
    assert (used["steps"], used["seconds"], used["copies"]) == (2, 10.0, 1)
    assert used["tokens_per_cpu_s"] == pytest.approx(50.0)
    assert used["copy_cpu_share"] == pytest.approx(0.05)
    assert (used["copy_s"], used["copy_waits"]) == (0.1, 1)


def test_a_joiner_is_in_step_once_it_is_as_near_as_donors_are():
    donor = [row(0.0, distance=None), row(1.0, distance=0.1), row(2.0, distance=0.3)]
    assert usual_distance(donor) == pytest.approx(0.2)
    rows = [row(0.0, step=7, distance=None), row(1.0, step=8, distance=0.5),
            row(2.0, step=9, distance=0.2)]  # fmt: skip
    stepped = in_step(rows, 0.25)
    assert stepped is not None
    assert stepped.step == 9
    assert in_step(rows[:2], 0.25) is None


def test_the_summary_is_the_donors_median_and_the_longest_copy():
    def donor(kept, copy_s):
        base = {**spent([row(0.0), row(1.0, cpu_s=1.0, tokens=100)]), "copy_s": copy_s}
        return {"before": base, "during": {**base, "tokens_per_cpu_s": 100 * kept}}

    names = ("transfer_s", "bytes", "mbit_per_s", "pieces", "pieces_twice", "wire_ratio",
             "windows_to_step", "steps_behind")  # fmt: skip
    killed = {"before": donor(1.0, 0.0)["before"]}
    donors = {"a": donor(0.9, 0.1), "b": donor(1.0, 0.3), "c": donor(0.98, 0.2), "d": killed}
    found = summary_of({**dict.fromkeys(names, 1), "donors": donors})
    assert (found["speed_kept"], found["copy_s"]) == (0.98, 0.3)
