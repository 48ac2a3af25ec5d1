"""`python -m benchmarks.convergence`: tuned rules on real text, one corpus per peer.

Finished runs are kept, so that the command may be interrupted and given again. Progress goes to
stderr; the last line on stdout is the summary as JSON.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import common
from benchmarks.convergence import figure, plan, summary, work
from benchmarks.convergence.methods import METHODS, Setting
from benchmarks.simulator import corpora


def main() -> None:
    options = _options()
    chosen = _quick() if options.quick else _full(options)
    cache = work.Cache(options.cache)

    def progress(results: work.Known) -> None:
        print(summary.show(summary.table(chosen, results)), file=sys.stderr, flush=True)

    results = work.work(chosen, cache, options.workers, progress)
    rows = summary.table(chosen, results)
    found = summary.summary(chosen, results)
    if not options.quick and options.only is None:
        kinds = corpora.collect(max(options.peers))
        details = {
            "rows": rows,
            "runs": len(results),
            "corpora": {c.kind: {"digest": c.digest, "bytes": c.train.numel()} for c in kinds},
        }
        path = common.write_result("convergence", found, details, " ".join(sys.argv))
        figure.draw(rows, Path(path).with_suffix(".png"))
    common.emit(found)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.convergence", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny, under two minutes, not kept")
    parser.add_argument("--peers", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--steps", type=int, nargs="+", default=[240, 1000])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", choices=list(METHODS), help="run this method, print its rows")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--cache", type=Path, default=work.default_cache(), help="finished runs")
    return parser.parse_args()


def _full(options: argparse.Namespace) -> plan.Plan:
    return plan.full(options.peers, options.steps, options.seeds, options.only)


def _quick() -> plan.Plan:
    """Few steps at one rate: shows that everything runs, not what is better."""
    setting = Setting(peers=4, steps=40)
    block = plan.Block(setting, plan.KEY_METHODS, ("spread, 30% failing",))
    return plan.Plan((block,), seeds=1, first_rates=(5e-3,), extend=False)


if __name__ == "__main__":
    main()
