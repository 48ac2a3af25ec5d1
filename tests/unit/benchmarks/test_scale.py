"""The scale benchmark's own arithmetic: books are compared honestly, mixing is the real one."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.scale.consensus import FRAGMENTS, run
from benchmarks.scale.rig import account, disagreement


def books(begun: list[int], merged: list[int], skipped: int | None = None) -> dict[str, Any]:
    dropped = sorted(set(begun) - set(merged))
    reasons = len(dropped) if skipped is None else skipped
    return {
        "begun": begun, "merged": merged, "dropped": dropped,
        "skipped": {"timeout": reasons}, "told_one_sided": 0,
    }  # fmt: skip


def test_both_sides_agree():
    found = account([books([1, 2], [1, 2]), books([1, 2], [1, 2])])
    assert found["accounted_share"] == 1
    assert found["merged_on_both_sides"] == 2
    failed = account([books([1, 2], [1]), books([1, 2], [1])])
    assert failed["accounted_share"] == 1
    assert (failed["merged_on_both_sides"], failed["given_up_sides"]) == (1, 2)


def test_a_one_sided_merge_counts_unless_it_was_told():
    one, other = books([1, 2], [1, 2]), books([1, 2], [1])
    assert account([one, other])["accounted_share"] == 0.5
    one["told_one_sided"] = 1
    assert account([one, other])["accounted_share"] == 1


def test_an_end_without_a_reason_counts():
    assert account([books([1], [], 0), books([1], [], 1)])["accounted_share"] == 0
    unended = books([1], [1]) | {"merged": []}
    assert account([unended, books([1], [1])])["accounted_share"] < 1


def test_disagreement_is_the_longest_run_of_seconds():
    same, other = {"0": "a", "1": "a"}, {"0": "a", "1": "b"}
    views = [{"10": other, "11": other, "12": same, "13": other, "14": same}]
    assert disagreement(views, 10) == {"longest_s": 2, "runs_s": [2, 1]}
    assert disagreement(views, 12) == {"longest_s": 1, "runs_s": [1]}
    across = [{"10": {"0": "a"}, "11": {"0": "a"}}, {"10": {"1": "b"}, "11": {"1": "a"}}]
    assert disagreement(across, 10)["longest_s"] == 1


@pytest.mark.parametrize(("k", "zones", "most"), [(2, 0, 10), (4, 0, 5), (0, 0, 1), (2, 4, 30)])
def test_peers_come_together_and_keep_their_mean(k: int, zones: int, most: int):
    found = run(16, k=k, zones=zones)
    assert found.slots <= most * FRAGMENTS
    assert found.mean_moved < 0.02
    assert found.exchanges_per_peer <= found.slots * ((k or 16) - 1)
