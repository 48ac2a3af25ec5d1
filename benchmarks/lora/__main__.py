"""`python -m benchmarks.lora`: adapters of which both factors are trained, or B alone.

Finished runs are kept, so that the command may be interrupted and given again. Progress goes to
stderr; the last line on stdout is the summary as JSON.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import common
from benchmarks.lora.plan import Plan, summary_of, table
from benchmarks.privacy import setting, work
from benchmarks.simulator import corpora


def main() -> None:
    """Run what is not there yet, and say what came of all."""
    options = _options()
    quick: bool = options.quick
    plan = Plan(seeds=1, quick=True) if quick else Plan(options.seeds)
    known = work.Kept(None if quick else options.cache)
    work.work(plan.wanted, known, options.workers)
    rows = plan.rows(known)
    common.say(table(rows))
    found = summary_of(rows)
    if not quick:
        kinds = corpora.collect(setting.PEERS + 1)
        digests = {c.kind: {"digest": c.digest, "bytes": c.train.numel()} for c in kinds}
        command = " ".join(["python -m benchmarks.lora", *sys.argv[1:]])
        common.write_result("lora", found, {"rows": rows, "corpora": digests}, command)
    common.emit("lora", found)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.lora", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny, under two minutes, not kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    cache = work.default_cache("lora")
    parser.add_argument("--cache", type=Path, default=cache, help="finished runs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
