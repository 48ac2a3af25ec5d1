"""What all benchmarks share: where it ran, with what, and how a result is written down."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "numpy", "hivemind", "uvloop", "PyNaCl", "msgspec")


def machine() -> dict[str, Any]:
    """Processor, cores and memory."""
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"processor": model, "cores": os.cpu_count(), "memory_gb": round(memory / 1e9, 1)}


def versions() -> dict[str, str]:
    """Of Python and what the figures depend on."""
    found = {name: metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found}


def write_result(name: str, summary: dict[str, Any], details: Any, command: str) -> Path:
    """Write benchmarks/results/NAME.json."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    result = {
        "summary": summary,
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "details": details,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def emit(summary: dict[str, Any]) -> None:
    """The one line of JSON at the end."""
    sys.stdout.write(json.dumps(summary) + "\n")
    sys.stdout.flush()
