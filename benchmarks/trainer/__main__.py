"""`python -m benchmarks.trainer`: what a node's trainer costs beyond a loop written by hand.

The same model, the same text, attention, fused AdamW, precision and batch. A swarm of two real
daemons trains for some windows and pauses; then two loops by hand take as many steps; and so on in
turn, ten times. Tokens per second that the trainers' processes computed, so that other load hardly
counts (on a GPU by the clock). The trainers' include their measurements of losses and their share
of exchanges; the end of a run is not measured. A trainer has one thread, and so has a loop.

A ratio is the worst of all models that are given. `--model FOLDER` adds one to the Llama of 2 M
parameters.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.trainer import pair
from benchmarks.trainer.case import WINDOW, Case, Kind
from xpeer.policies import PrivacyMode, privacy_policy

CASES: tuple[tuple[Kind, PrivacyMode], ...] = (
    ("full", "off"),
    ("lora", "off"),
    ("full", "record"),
    ("lora", "record"),
)
KEYS = {"record": {"full": "private_ratio_full", "lora": "private_ratio_lora"}}
SMALL_BATCH, LARGE_BATCH = 32, 8
"""Records a step."""
FEW: int = 10**7
"""Trained parameters below which memory for exchanges is told as a whole."""


def measure(
    models: Sequence[Path | None], only: Sequence[str], device: str, rounds: int, windows: int
) -> dict[str, Any]:
    """The claimed figures, and all that was measured."""
    summary: dict[str, float] = {}
    details: dict[str, Any] = {"rounds": rounds, "windows": windows}
    for model in models:
        for kind, mode in CASES:
            if only and f"{kind}-{mode}" not in only:
                continue
            batch = LARGE_BATCH if model else SMALL_BATCH
            case = Case(kind, mode, model, batch, device)
            # a window of a model that somebody brings is long enough for a turn
            found = compare(case, rounds, WINDOW * (1 if model else windows))
            details[case.name] = found
            common.say(f"{case.name}: {json.dumps(found)}")
            key = KEYS.get(mode, {}).get(kind, "tokens_ratio_to_plain_loop")
            _worst(summary, key, found["ratio"], min)
            if not privacy_policy(mode).charges and "memory_ratio" in found:
                _worst(summary, "memory_ratio", found["memory_ratio"], max)
                if found["memory"]["num_params"] < FEW:  # most of it does not depend on them
                    _worst(summary, "exchange_mb_of_few", found["exchange_mb"], max)
                else:
                    _worst(summary, "exchange_bytes", found["exchange_bytes"], max)
    return {"summary": {key: round(value, 4) for key, value in summary.items()}, **details}


def _worst(summary: dict[str, float], key: str, value: float, worse: Callable[..., float]) -> None:
    summary[key] = worse(value, summary.get(key, value))


def compare(case: Case, rounds: int, steps: int) -> dict[str, Any]:
    """Tokens per second of both, some steps of each in turn; a ratio and its extremes."""
    speeds: dict[str, list[float]] = {"swarm": [], "by hand": []}
    exchanges, plain_peak = 0, None
    with tempfile.TemporaryDirectory() as folder, pair.running(Path(folder), case) as swarm:
        with loops(case) as step:
            for turn in range(rounds + 1):
                done = swarm.work(steps)
                tokens, seconds, plain_peak = step(steps)
                if not turn:  # the first warms up
                    swarm.save()
                    continue
                speeds["swarm"].append(done.tokens / done.seconds)
                speeds["by hand"].append(tokens / seconds)
                exchanges += done.exchanges
        memory = swarm.memory()
    ratios = [a / b for a, b in zip(speeds["swarm"], speeds["by hand"], strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "lowest_and_highest": [min(ratios), max(ratios)],
        "tokens_per_cpu_s": {who: statistics.median(found) for who, found in speeds.items()},
        "exchanges": exchanges,
        **({} if plain_peak is None else _memory(memory, plain_peak)),
    }


def _memory(trainer: pair.Memory, by_hand: int) -> dict[str, Any]:
    return {
        "memory": {**asdict(trainer), "by hand": by_hand},
        "memory_ratio": trainer.own / by_hand,
        "exchange_mb": trainer.exchange / 1e6,
        "exchange_bytes": trainer.exchange / trainer.num_params,
    }


@contextmanager
def loops(case: Case) -> Iterator[Callable[[int], tuple[int, float, int | None]]]:
    """Two loops by hand side by side, as the two trainers are: tokens, seconds, largest memory."""
    command = [sys.executable, "-m", "benchmarks.trainer.by_hand", case.kind, str(case.batch)]
    command += [case.device, *([str(case.model)] if case.model else [])]
    with ExitStack() as stack:
        both = [
            stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            for _ in range(2)
        ]

        def step(steps: int) -> tuple[int, float, int | None]:
            for loop in both:
                assert loop.stdin
                loop.stdin.write(f"{steps}\n")
                loop.stdin.flush()
            answers = [json.loads(loop.stdout.readline()) for loop in both if loop.stdout]
            peaks = [answer["peak"] for answer in answers]
            return (
                sum(answer["tokens"] for answer in answers),
                sum(answer["seconds"] for answer in answers),
                None if None in peaks else max(peaks),
            )

        yield step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser("benchmarks.trainer", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shows that it runs; keeps nothing")
    parser.add_argument("--model", type=Path, help="a Hugging Face folder, measured as well")
    parser.add_argument("--only", action="append", default=[], metavar="KIND-MODE")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--windows", type=int, default=2, help="of the small model, a turn")
    options = parser.parse_args()
    rounds = 2 if options.quick else options.rounds
    models: list[Path | None] = [None, *([options.model] if options.model else [])]
    measured = measure(models, options.only, options.device, rounds, options.windows)
    summary = measured.pop("summary")
    if not (options.quick or options.only):
        command = f"python -m benchmarks.trainer{' --model FOLDER' if options.model else ''}"
        common.write_result("trainer", summary, measured, command)
    common.emit("trainer", summary)


if __name__ == "__main__":
    main()
