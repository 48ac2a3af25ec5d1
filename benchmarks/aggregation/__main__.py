"""`python -m benchmarks.aggregation`: ways to aggregate on unequal clouds, and to divide a corpus.

Finished runs are kept, so that the command may be interrupted and given again. Progress goes to
stderr; the last line on stdout is the summary as JSON.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.aggregation import division, figure, setting, summary, work
from benchmarks.simulator import corpora


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    if options.quick:
        methods = work.quick_results(work.Kept(None))
        shares = _shares(rate=None, kind_bytes=100_000)
    else:
        methods = work.results(options.seeds, work.Kept(options.cache))
        shares = _shares(methods["spread gossip"]["rate"], division.KIND_BYTES)
    found = summary.summary(methods, shares)
    if not options.quick:
        kinds = corpora.collect(setting.CLOUDS)
        details = {
            "assumptions": {
                "clouds": setting.CLOUDS,
                "data_parts": setting.DATA,
                "part_bytes": setting.PART_BYTES,
                "slowness": setting.SLOWNESS,
                "window_steps": setting.WINDOW_STEPS,
                "rounds": setting.ROUNDS,
                "bandwidth_mbit_s": setting.LINK.bandwidth_mbit_s,
                "latency_s": setting.LINK.latency_s,
                "step_s": setting.LINK.step_s,
                "model_params_on_links": setting.LINK.model_params,
                "gpu_hour_usd": setting.GPU_HOUR_USD,
                "egress_gb_usd": setting.EGRESS_GB_USD,
                "codec": setting.CODEC,
            },
            "methods": methods,
            "shares": shares,
            "corpora": {c.kind: {"digest": c.digest, "bytes": c.train.numel()} for c in kinds},
        }
        command = "python -m benchmarks.aggregation " + " ".join(sys.argv[1:])
        path = common.write_result("aggregation", found, details, command.strip())
        figure.draw(methods, shares, path.with_suffix(".png"))
    common.emit("aggregation", found)


def _shares(rate: float | None, kind_bytes: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, changing in (("steady", False), ("changing", True)):
        found[key] = {}
        for policy in division.POLICIES:
            learns = rate if changing else None
            run = division.Run(policy, learns, changing=changing, kind_bytes=kind_bytes)
            figures = found[key][policy] = {"ideal_s": run.ideal_s, **run.figures()}
            common.say(f"{policy} shares, {key}: all seen after {figures['makespan_s']:.0f} s")
    return found


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.aggregation", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny, under two minutes, not kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=work.default_cache(), help="finished runs")
    return parser.parse_args()


if __name__ == "__main__":
    main()
