"""`python -m benchmarks.privacy.accounting`: four accountants on the same charges.

The node's own (privacy loss distributions), the replay behind `xpeer privacy verify`, opacus' PRV
accountant, and Renyi's bound, which none of the others may exceed: on the five parameter sets of
the tests and on a hundred random ones. Takes minutes; the last line is JSON.
"""

from __future__ import annotations

import argparse
import random
import warnings
from typing import Any

from benchmarks import common
from xpeer.privacy.accountant import Segment, epsilon, epsilon_rdp
from xpeer.privacy.replay import epsilon_replayed

KNOWN = [
    ([Segment(1.0, 0.01, 1000)], 1e-5),
    ([Segment(0.6, 0.004, 5000)], 1e-6),
    ([Segment(2.0, 0.05, 2000)], 1e-5),
    ([Segment(1.0, 1.0, 10)], 1e-5),
    ([Segment(4.0, 1.0, 50)], 1e-5),
]
OPACUS_ERROR = 0.005
"""Of epsilon, absolute: what opacus is asked for; less takes it much longer."""


def random_charges(seed: int) -> tuple[list[Segment], float]:
    """One to three kinds of steps, and delta."""
    draw = random.Random(seed)
    segments = [
        Segment(
            round(draw.uniform(0.6, 4.0), 3), 10 ** draw.uniform(-3.0, -1.0), draw.randint(1, 800)
        )
        for _ in range(draw.randint(1, 3))
    ]
    return segments, 10 ** draw.uniform(-7.0, -4.0)


def by_opacus(segments: list[Segment], delta: float) -> float:
    """Its PRV accountant's upper bound."""
    from opacus.accountants import PRVAccountant  # noqa: PLC0415 - slow to import

    accountant = PRVAccountant()
    accountant.history = [(s.noise_multiplier, s.sampling_probability, s.steps) for s in segments]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(
            accountant.get_epsilon(delta, eps_error=OPACUS_ERROR, delta_error=delta / 1000)
        )


def measure(quick: bool) -> dict[str, Any]:
    """Largest disagreements, relative; opacus' own error is taken off its difference."""
    cases = [*KNOWN, *(random_charges(seed) for seed in range(5 if quick else 100))]
    rows = []
    for segments, delta in cases:
        ours, again = epsilon(segments, delta), epsilon_replayed(segments, delta)
        prv, loose = by_opacus(segments, delta), epsilon_rdp(segments, delta)
        rows.append((ours, again, prv, loose))
        common.say(f"{ours:9.4f} {again:9.4f} {prv:9.4f} {loose:9.4f}  {segments}")
    return {
        "cases": len(rows),
        "accountant_from_replay": max(abs(a - b) / b for a, b, _, _ in rows),
        "replay_from_opacus": max(max(0.0, abs(b - c) - OPACUS_ERROR) / c for _, b, c, _ in rows),
        "above_renyi": sum(b > d or a > d for a, b, _, d in rows),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser("benchmarks.privacy.accounting", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="five random ones")
    common.emit("privacy.accounting", measure(parser.parse_args().quick))
