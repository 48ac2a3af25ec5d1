"""D34: every start tried all engines, and timing noise decided anew."""

from __future__ import annotations

from pathlib import Path

from tests.unit.training.homes import make_homes
from xpeer.trainer.build import assemble


def test_the_choice_of_an_engine_outlives_a_restart(tmp_path: Path) -> None:
    """The second start tells the figures of the first: it measured none of its own."""
    changes = ("privacy.noise_multiplier=1.0", "end.steps=20")
    (setup,) = make_homes(tmp_path, 1, privacy="record", changes=changes)
    told = []
    for _ in range(2):
        node = assemble(setup)
        told.append((node.mechanism.engine, node.spent().engine_reason))
        node.close()
    assert told[0] == told[1]
