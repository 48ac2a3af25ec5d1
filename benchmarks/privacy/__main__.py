"""`python -m benchmarks.privacy`: what privacy costs, and what attackers get in spite of it.

Finished runs are kept, so that the command may be interrupted and given again. Progress goes to
stderr; the last line on stdout is the summary as JSON.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import common
from benchmarks.privacy import cost, figure, plan, setting, summary, work
from benchmarks.simulator import corpora

CLAIMED = ("lora_speed", "full_speed")
"""Of what `cost` measures, in the summary."""


def main() -> None:
    options = _options()
    if options.quick:
        chosen, known = plan.Plan(seeds=1, audits=1, quick=True), work.Kept(None)
    else:
        chosen, known = plan.Plan(options.seeds), work.Kept(options.cache)

    def wanted(finished: work.Known) -> list[work.Job]:
        return [
            job
            for job in chosen.wanted(finished)
            if options.only is None or type(job).__name__.lower() in options.only
        ]

    work.work(wanted, known, options.workers)
    rows = {
        "utility": summary.utility(chosen, known),
        "attacks": summary.attacks(chosen, known),
        "whitebox": summary.whitebox(chosen, known),
        "inversion": summary.inversion(chosen, known),
    }
    common.say(summary.show(rows))
    lora = next((known[job] for job in chosen.loras() if job in known), None)
    found = summary.summary(rows, lora)
    measured = cost.measure(options.quick) if options.only is None else None
    if measured is not None:
        found |= {key: measured["summary"][key] for key in CLAIMED}
    if measured is not None and not options.quick:
        kinds = corpora.collect(setting.PEERS + 1)
        details = {
            **rows,
            "lora": lora,
            "cost": measured,
            "corpora": {c.kind: {"digest": c.digest, "bytes": c.train.numel()} for c in kinds},
        }
        command = "python -m benchmarks.privacy " + " ".join(sys.argv[1:])
        path = common.write_result("privacy", found, details, command.strip())
        figure.draw(rows, path.with_suffix(".png"))
    common.emit("privacy", found)
    if found["audit_violations"]:
        sys.exit("an attack shows more than the ledger claims: see audit_violations")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.privacy", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny, under two minutes, not kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=["utility", "attacked", "whitebox", "inversion", "lora"],
        help="run these jobs, write no results",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--cache", type=Path, default=work.default_cache(), help="finished runs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
