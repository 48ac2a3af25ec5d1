"""The project's own walls, counted: what one has to keep in mind stays small."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from structure import measure

ROOT: Final = Path(__file__).parents[3]
RECORDS: Final = {
    "xpeer.cli.demo.report:Report",
    "xpeer.cli.demo.report:PeerReport",
    "xpeer.training.schedule:Counters",
}
"""Plain records: all that they take is kept and given as it is."""


def test_no_circle_no_crowded_class_and_no_rule_by_its_name() -> None:
    numbers: dict[str, Any] = measure(ROOT)
    assert not numbers["circles"]
    assert not numbers["comparisons"]
    crowded = {c["class"]: c["names"] for c in numbers["mutable_attributes"] if c["count"] > 12}
    assert not crowded
    made_of = {c["class"]: c["names"] for c in numbers["constructor_arguments"] if c["count"] > 8}
    assert made_of.keys() <= RECORDS, made_of
