"""Takes one real step in a process of its own, and prints how much memory that took.

It is what the process had at most during the step, less what it had before there was a model. Huge
pages are switched off: they count as resident as a whole.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.estimate.cases import CASES
from xpeer.estimate.step import Step, take
from xpeer.founding_model import PRESETS
from xpeer.training.adapters import adapt
from xpeer.training.held import DTYPES, hold
from xpeer.training.model import build

_PR_SET_THP_DISABLE = 41


def memory(key: str) -> int:
    """A line of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {key}")


def main() -> None:
    """Measure the case that is named."""
    step = CASES[sys.argv[1]]
    torch.set_num_threads(1)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    tiny = {**PRESETS["tiny"], "model_type": step.config["model_type"], "head_dim": 16}
    run(replace(step, config=tiny, sequence_tokens=64, micro_batch=1), gc.collect)  # libraries
    gc.collect()
    before = memory("VmRSS")
    run(step, count_from_here)
    print(json.dumps({"measured": memory("VmHWM") - before}))


def count_from_here() -> None:
    """Have the system forget the peak so far: a model takes more while it is built."""
    Path("/proc/self/clear_refs").write_text("5")


def run(step: Step, begin: Callable[[], object]) -> None:
    """Build the model, and take one step; `begin` is called when it begins."""
    model = hold(build(step.config), DTYPES[step.base_dtype])
    take(step, model if step.lora is None else adapt(model, step.lora), begin)


if __name__ == "__main__":
    main()
