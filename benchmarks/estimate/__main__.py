"""What `xpeer estimate` says of a step's memory, against processes that take the step.

Each case runs in a process of its own, on a CPU with one thread, without huge pages. The peak of
its resident memory is compared with the estimate. Then whole trainers, as nodes start them: their
resident memory, libraries included, with what the C library keeps of freed memory. The last plan is
rehearsed only: 7 B parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks.common import emit, say, write_result
from benchmarks.estimate.cases import CASES, PLAN, QUICK, QUICK_TRAINERS, TRAINERS
from xpeer.estimate.step import memory_of

CLOSE = 0.10
"""Largest relative difference that is claimed."""


def measured(name: str) -> int:
    """Bytes that the case took at most."""
    command = [sys.executable, "-m", "benchmarks.estimate.child", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "262144"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    return int(json.loads(done.stdout.splitlines()[-1])["measured"])


def compared(name: str) -> dict[str, Any]:
    """One case."""
    estimated, real = memory_of(CASES[name]).peak, measured(name)
    row = {"estimated": estimated, "measured": real, "ratio": round(estimated / real, 3)}
    say(f"{name}: {row}")
    return row


def trainer(name: str) -> dict[str, Any]:
    """A whole trainer: where memory is short, and where the C library keeps freed memory."""

    def do(part: str, folder: str) -> Any:
        command = [sys.executable, "-m", "benchmarks.estimate.trainer", part, name, folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
        return json.loads(done.stdout.splitlines()[-1])

    found = {}
    for part in ("short", "run"):
        with tempfile.TemporaryDirectory() as folder:
            do("draft", folder)
            found[part] = do(part, folder)
    short, kept = found["short"], found["run"]
    row = {
        "ratio": round(short["estimated"] / most_of(short), 3),
        "ratio_with_slack": round((kept["estimated"] + kept["slack"]) / most_of(kept), 3),
        "slower": round(short["cpu_s"] / kept["cpu_s"], 2),
        "short": short,
        "kept": kept,
    }
    say(f"trainer, {name}: {row}")
    return row


def most_of(trainer: dict[str, int]) -> int:
    """The most of its start and of its steps."""
    return max(trainer["start"], trainer["steps"])


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the small cases alone; keep nothing")
    quick = parser.parse_args().quick
    rows = {name: compared(name) for name in (QUICK if quick else CASES)}
    worst = max(abs(row["ratio"] - 1) for row in rows.values())
    trainers = {name: trainer(name) for name in (QUICK_TRAINERS if quick else TRAINERS)}
    plan = memory_of(PLAN)
    summary = {
        "cases": len(rows),
        "worst_error": round(worst, 3),
        "within_10_percent": sum(abs(row["ratio"] - 1) <= CLOSE for row in rows.values()),
        "trainers": len(trainers),
        "trainer_ratios": _range(trainers, "ratio"),
        "trainer_ratios_with_slack": _range(trainers, "ratio_with_slack"),
        "slower_where_short": _range(trainers, "slower"),
        "plan_7b_lora_gb": round(plan.peak / 1e9, 2),
        "plan_7b_lora_fits_24_gb": plan.peak < 24e9,
    }
    if not quick:
        details = {"cases": rows, "trainers": trainers}
        write_result("estimate", summary, details, "python -m benchmarks.estimate")
    emit("estimate", summary)


def _range(rows: dict[str, dict[str, Any]], key: str) -> list[float]:
    values = [row[key] for row in rows.values()]
    return [min(values), max(values)]


if __name__ == "__main__":
    main()
