"""`python -m benchmarks.privacy.accounting`: four accountants on the same charges.

The node's own (privacy loss distributions), the replay behind `xpeer privacy verify`, opacus' PRV
accountant, and Renyi's bound, which none of the others may exceed: on the five parameter sets of
the tests and on a hundred random ones. Takes minutes, and leaves
results/accounting.json; the last line is JSON.
"""

from __future__ import annotations

import argparse
import random
import warnings
from typing import Any

from benchmarks import common
from xpeer.accounts.accountant import Segment, epsilon, epsilon_rdp
from xpeer.accounts.replay import replay

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


def by_opacus(segments: list[Segment], delta: float) -> tuple[float, float]:
    """Its PRV accountant's estimate, and its upper bound: about OPACUS_ERROR more."""
    from opacus.accountants import PRVAccountant  # noqa: PLC0415 - slow to import

    accountant = PRVAccountant()
    accountant.history = [(s.noise_multiplier, s.sampling_probability, s.steps) for s in segments]
    error = delta / 1000
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # get_epsilon tells the bound alone
        composed = accountant._get_dprv(eps_error=OPACUS_ERROR, delta_error=error)
        _, estimate, upper = composed.compute_epsilon(delta, error, OPACUS_ERROR)
    return float(estimate), float(upper)


def measure(quick: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Largest disagreements, relative, and all cases; of opacus its estimate."""
    cases = [*KNOWN, *(random_charges(seed) for seed in range(5 if quick else 100))]
    rows = []
    for segments, delta in cases:
        ours, again = epsilon(segments, delta), replay(segments, delta)
        prv, loose = by_opacus(segments, delta), epsilon_rdp(segments, delta)
        rows.append((ours, again, prv, loose))
        common.say(f"{ours:9.4f} {again.estimate:9.4f} {prv[0]:9.4f} {loose:9.4f}  {segments}")
    summary = {
        "cases": len(rows),
        "accountant_from_replay": max(abs(a - b.estimate) / b.estimate for a, b, _, _ in rows),
        "replay_from_opacus": max(abs(b.estimate - c[0]) / c[0] for _, b, c, _ in rows),
        "above_renyi": sum(b.estimate > d or a > d for a, b, _, d in rows),
        "accountant_below_certain_bound": sum(a < b.lower for a, b, _, _ in rows),
    }
    told = [
        {
            "steps": [[s.noise_multiplier, s.sampling_probability, s.steps] for s in segments],
            "delta": delta,
            "accountant": ours,
            "replay": again.estimate,
            "certain": [again.lower, again.upper],
            "opacus": list(prv),
            "renyi": loose,
        }
        for (segments, delta), (ours, again, prv, loose) in zip(cases, rows, strict=True)
    ]
    return summary, told


if __name__ == "__main__":
    parser = argparse.ArgumentParser("benchmarks.privacy.accounting", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="five random ones")
    quick = parser.parse_args().quick
    found, cases = measure(quick)
    if not quick:
        command = "python -m benchmarks.privacy.accounting"
        common.write_result("accounting", found, {"cases": cases}, command)
    common.emit("privacy.accounting", found)
