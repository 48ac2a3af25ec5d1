"""Takes one real step in a process of its own, and prints how much memory that took.

It is what the process had at most, less what it had before there was a model.
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.estimate.cases import CASES
from xpeer.estimate.step import Step, take
from xpeer.founding_model import PRESETS
from xpeer.training.adapters import adapt
from xpeer.training.held import DTYPES, hold
from xpeer.training.model import build


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
    tiny = {**PRESETS["tiny"], "model_type": step.config["model_type"], "head_dim": 16}
    run(replace(step, config=tiny, sequence_tokens=64, micro_batch=1))  # for libraries
    gc.collect()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    run(step)
    print(json.dumps({"measured": memory("VmHWM") - before}))


def run(step: Step) -> None:
    """Build the model, and take one step."""
    model = hold(build(step.config), DTYPES[step.base_dtype])
    take(step, model if step.lora is None else adapt(model, step.lora), lambda: None)


if __name__ == "__main__":
    main()
