"""`python -m benchmarks.trainer`: a node's trainer against a loop that somebody writes by hand.

The same model, the same text, attention, fused AdamW, precision and batch; steps of both in turn,
in one process. Tokens per CPU-second (the process's own seconds, so that other load hardly counts;
on a GPU by the clock). The node's include its measurements of losses, and all that its loop does at
boundaries; there is no network. Memory: the peak of a process of its own for each.

A ratio is the worst of all models that are given. `--model FOLDER` adds one to the Llama of 2 M
parameters.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.trainer.node import Kind, Mode, loop_by_hand, make_node
from xpeer.policies import privacy_policy

CASES: tuple[tuple[Kind, Mode], ...] = (
    ("full", "off"),
    ("lora", "off"),
    ("full", "record"),
    ("lora", "record"),
)
KEYS = {"record": {"full": "private_ratio_full", "lora": "private_ratio_lora"}}


def measure(models: list[Path | None], device: str, rounds: int, steps: int) -> dict[str, Any]:
    """The claimed figures, and all that was measured."""
    summary: dict[str, float] = {}
    details: dict[str, Any] = {"rounds": rounds, "steps": steps, "threads": torch.get_num_threads()}
    for model in models:
        for kind, mode in CASES:
            found = _speeds(kind, mode, model, device, rounds, steps)
            if not privacy_policy(mode).charges:
                peaks = {who: _peak(kind, model, device, who, steps) for who in ("node", "by hand")}
                found["peak_bytes"] = peaks
                _worst(summary, "memory_ratio", peaks["node"] / peaks["by hand"], max)
            private = privacy_policy(mode).charges
            key = KEYS[mode][kind] if private else "tokens_ratio_to_plain_loop"
            _worst(summary, key, found["ratio"], min)
            details[f"{model.name if model else 'small'} {kind} {mode}"] = found
            common.say(f"{model or 'small'} {kind} {mode}: {json.dumps(found)}")
    return {"summary": {key: round(value, 4) for key, value in summary.items()}, **details}


def _worst(summary: dict[str, float], key: str, value: float, worse: Callable[..., float]) -> None:
    summary[key] = worse(value, summary.get(key, value))


def _speeds(
    kind: Kind, mode: Mode, model: Path | None, device: str, rounds: int, steps: int
) -> dict[str, Any]:
    """Tokens per second of both, some steps of each in turn; a ratio and its quartiles."""
    with tempfile.TemporaryDirectory() as folder:
        node = make_node(Path(folder), kind, mode, model, device)
        by_hand = loop_by_hand(node)
        on_gpu = next(node.model.parameters()).device.type == "cuda"

        def of_node() -> int:
            before = node.trainer.counters.tokens
            node.trainer.run(steps)
            return node.trainer.counters.tokens - before

        def of_hand() -> int:
            return sum(by_hand() for _ in range(steps))

        speeds: dict[str, list[float]] = {"node": [], "by hand": []}
        for turn in range(rounds + 1):
            pair = [("node", of_node), ("by hand", of_hand)]
            for who, work in pair if turn % 2 else reversed(pair):
                began = _now(on_gpu)
                tokens = work()
                if turn:  # the first warms up
                    speeds[who].append(tokens / (_now(on_gpu) - began))
        ratios = [a / b for a, b in zip(speeds["node"], speeds["by hand"], strict=True)]
        node.close()
        return {
            "ratio": statistics.median(ratios),
            "lowest_and_highest": [min(ratios), max(ratios)],
            "tokens_per_s": {who: statistics.median(found) for who, found in speeds.items()},
            "engine": node.mechanism.engine,
            "precision": node.beginning.precision,
        }


def _now(on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def _peak(kind: Kind, model: Path | None, device: str, who: str, steps: int) -> int:
    """Bytes at the peak of a process of its own, over those of one that has made the model."""
    command = [sys.executable, "-m", "benchmarks.trainer", "--one", kind, who, "--steps"]
    command += [str(steps), "--device", device, *(["--model", str(model)] if model else [])]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(ran.stdout.splitlines()[-1])


def _one(kind: Kind, who: str, model: Path | None, device: str, steps: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        node = make_node(Path(folder), kind, "off", model, device)
        if who == "node":
            node.trainer.run(steps)
        else:
            step = loop_by_hand(node)
            for _ in range(steps):
                step()
        on_gpu = next(node.model.parameters()).device.type == "cuda"
        print(torch.cuda.max_memory_allocated() if on_gpu else _peak_bytes())
        node.close()


def _peak_bytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) << 10


def main() -> None:
    """Measure and print; or, for `measure`, one process' memory."""
    parser = argparse.ArgumentParser("benchmarks.trainer", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shows that it runs; keeps nothing")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder, measured as well")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=4, help="of each in turn")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "WHO"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        kind, who = options.one
        _one(kind, who, options.model, options.device, options.steps)
        return
    rounds, steps = (2, 1) if options.quick else (options.rounds, options.steps)
    models: list[Path | None] = [None, *([options.model] if options.model else [])]
    measured = measure(models, options.device, rounds, steps)
    summary = measured.pop("summary")
    if not options.quick:
        common.write_result("trainer", summary, measured, "python -m benchmarks.trainer")
    common.emit("trainer", summary)


if __name__ == "__main__":
    main()
