"""`python -m benchmarks.convergence`: tuned rules on real text, one corpus per peer.

Finished runs are kept, so that the command may be interrupted and given again. Progress goes to
stderr; the last line on stdout is the summary as JSON.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks import common
from benchmarks.convergence import figure, plan, summary, work
from benchmarks.convergence.methods import METHODS, Setting
from benchmarks.simulator import corpora


def main() -> None:
    options = _options()
    if options.quick:
        with tempfile.TemporaryDirectory() as folder:
            chosen, cache = _quick(), work.Cache(Path(folder))
            results = work.work(chosen, cache, options.workers, _Progress(chosen))
    else:
        chosen, cache = _full(options), work.Cache(options.cache)
        results = work.work(chosen, cache, options.workers, _Progress(chosen))
    rows = summary.table(chosen, results)
    found = summary.summary(chosen, results)
    if not options.quick and options.only is None:
        kinds = corpora.collect(max(options.peers))
        details = {
            "rows": rows,
            "runs": len(results),
            "corpora": {c.kind: {"digest": c.digest, "bytes": c.train.numel()} for c in kinds},
        }
        command = "python -m benchmarks.convergence " + " ".join(sys.argv[1:])
        path = common.write_result("convergence", found, details, command.strip())
        figure.draw(rows, path.with_suffix(".png"))
    common.emit("convergence", found)


class _Progress:
    """Prints the table of finished methods whenever it gained a row."""

    def __init__(self, chosen: plan.Plan) -> None:
        self._plan, self._shown = chosen, ""

    def __call__(self, results: work.Known) -> None:
        text = summary.show(summary.table(self._plan, results))
        if text != self._shown:
            print(text, file=sys.stderr, flush=True)
            self._shown = text


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
