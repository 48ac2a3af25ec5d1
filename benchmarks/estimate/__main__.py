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
    """A whole trainer: the most of its start and of its steps."""

    def do(part: str, folder: str) -> Any:
        command = [sys.executable, "-m", "benchmarks.estimate.trainer", part, name, folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
        return json.loads(done.stdout.splitlines()[-1])

    with tempfile.TemporaryDirectory() as folder:
        do("draft", folder)
        found: dict[str, Any] = do("run", folder)
    found["ratio"] = round(found["estimated"] / max(found["start"], found["steps"]), 3)
    say(f"trainer, {name}: {found}")
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the small cases alone; keep nothing")
    quick = parser.parse_args().quick
    rows = {name: compared(name) for name in (QUICK if quick else CASES)}
    worst = max(abs(row["ratio"] - 1) for row in rows.values())
    trainers = {name: trainer(name) for name in (QUICK_TRAINERS if quick else TRAINERS)}
    ratios = [row["ratio"] for row in trainers.values()]
    plan = memory_of(PLAN)
    summary = {
        "cases": len(rows),
        "worst_error": round(worst, 3),
        "within_10_percent": sum(abs(row["ratio"] - 1) <= CLOSE for row in rows.values()),
        "trainers": len(trainers),
        "trainer_ratio_least": min(ratios),
        "trainer_ratio_most": max(ratios),
        "plan_7b_lora_gb": round(plan.peak / 1e9, 2),
        "plan_7b_lora_fits_24_gb": plan.peak < 24e9,
    }
    if not quick:
        details = {"cases": rows, "trainers": trainers}
        write_result("estimate", summary, details, "python -m benchmarks.estimate")
    emit("estimate", summary)


if __name__ == "__main__":
    main()
