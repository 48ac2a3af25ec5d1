"""What every benchmark does alike: say where it ran, keep the result, end in one line of JSON."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "numpy", "hivemind", "transformers", "PyNaCl", "uvloop")


def machine() -> dict[str, Any]:
    """The machine, in words and numbers."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "load_1min": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Of Python, of xpeer and of what does the work."""
    found = {"python": platform.python_version()}
    for name in ("xpeer", *PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_result(
    name: str, summary: Mapping[str, Any], details: Mapping[str, Any], command: str
) -> Path:
    """Keep a full run as benchmarks/results/NAME.json.

    Args:
        name: of the benchmark.
        summary: the figures that are claimed, by their keys.
        details: all that was measured.
        command: that makes it again.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    result = {
        "summary": dict(summary),
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions(),
        "details": dict(details),
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def emit(name: str, summary: Mapping[str, Any]) -> None:
    """The last thing that a benchmark prints: one line of JSON on stdout."""
    print(json.dumps({"benchmark": name, **summary}), flush=True)


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")
