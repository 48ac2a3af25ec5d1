"""`python -m benchmarks.hostile`: three honest daemons and one hostile member with a certificate.

Each run is a swarm of four real daemons on this machine, from the first step to the closing
consolidation. Without an attack: `clean`; `speeds`, with members 1, 1, 1/2 and 1/4 as fast;
`joining`, where the last member joins after a third of the steps; `late`, where everybody merges
four steps later than it could.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.common import emit, say, write_result
from benchmarks.hostile.attacks import ALL, LATE
from benchmarks.hostile.peers import HOSTILE, NAMES, Peers, figures

COMMAND = "python -m benchmarks.hostile"
STEPS, QUICK_STEPS = 300, 40
TIMEOUT_S = 1500.0
SHARE = 1 / (len(NAMES) - 1)
"""Of everybody's meetings, those with the hostile one."""
CALM = ("clean", "speeds", "joining", LATE)
"""Without an attack."""
SPEEDS = (1.0, 1.0, 0.5, 0.25)
MAIN = ("flip", "drift", "stall")
"""What the results are of; the other attacks with `--only`."""


def measure(name: str, steps: int, changes: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """One swarm; its figures, and all that was seen."""
    attack = name if name in ALL else ""
    joins_at = steps // 3 if name == "joining" else 0
    with tempfile.TemporaryDirectory(prefix="xh-") as folder:
        peers = Peers(Path(folder), steps, changes)
        peers.prepare()
        honest = [peer for peer in NAMES if not attack or peer != HOSTILE]
        throttles = SPEEDS if name == "speeds" else (1.0,) * len(NAMES)
        with peers.running(attack or name * (name == LATE), throttles, joins_at):
            seen = peers.watch(honest, TIMEOUT_S)
    found = figures(seen)
    say(f"{name}: {found}")
    return found, {peer: asdict(each) for peer, each in seen.items()}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one attack, few steps, no result")
    parser.add_argument("--only", nargs="*", choices=[*CALM, *ALL], default=None)
    parser.add_argument(
        "--set", dest="changes", action="append", default=[], metavar="FIELD=VALUE",
        help="a field of the manifest, e.g. round.group=0; no result",
    )  # fmt: skip
    options = parser.parse_args()
    wanted = options.only or (["clean", "flip"] if options.quick else [*CALM, *MAIN])
    runs, details = {}, {}
    for name in wanted:
        steps = QUICK_STEPS if options.quick else STEPS
        runs[name], details[name] = measure(name, steps, options.changes)
    summary: dict[str, Any] = {"runs": runs}
    if "clean" in runs:
        left = (1 - SHARE) * runs["clean"]["exchanges_per_s"]
        for name in set(runs) & set(ALL):
            kept = runs[name]["honest_exchanges_per_s"] / left if left else 0.0
            runs[name]["of_what_the_share_leaves"] = round(kept, 3)
            added = runs[name]["public_loss"] - runs["clean"]["public_loss"]
            runs[name]["loss_added"] = round(added, 3)
    if not (options.quick or options.only or options.changes):
        write_result("hostile", summary, details, COMMAND)
    emit("hostile", summary)


if __name__ == "__main__":
    main()
