"""`python -m benchmarks.overlap`: steps per second with and without exchanges, on several links."""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import emit, say, write_result
from benchmarks.overlap import timeline, wire
from benchmarks.overlap.figure import draw
from benchmarks.overlap.peers import Peer
from benchmarks.overlap.wire import Wire
from xpeer.wire import link_plan

COMMAND = "python -m benchmarks.overlap"
SMOLLM2_135M = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
"""134,515,008 parameters; drawn at random, since no step computes anything with them."""
SMALL = {**SMOLLM2_135M, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
         "num_attention_heads": 3, "num_key_value_heads": 3, "vocab_size": 32768}  # fmt: skip
"""8 million parameters."""
UNLIMITED = float("inf")
WARM_UP_MERGES = 5
"""Of each peer, before anything is counted: the codec's kernels are compiled meanwhile."""


@dataclass(frozen=True)
class Point:
    """A link: rate, and delay each way."""

    mbit_per_s: float
    delay_s: float

    def __str__(self) -> str:
        rate = "unlimited" if self.mbit_per_s == UNLIMITED else f"{self.mbit_per_s:g} Mbit/s"
        return f"{rate}, {1e3 * self.delay_s:g} ms"


@dataclass(frozen=True)
class Plan:
    """What a run measures."""

    model: dict[str, Any]
    num_params: int
    step_s: float
    steps: int
    points: tuple[Point, ...]


PROMISED = Point(200.0, 0.05)
FULL = Plan(SMOLLM2_135M, 134_515_008, 1.0, 60, (PROMISED, Point(UNLIMITED, 0.0), Point(50.0, 0.1)))
QUICK = Plan(SMALL, 8_062_656, 0.25, 40, (PROMISED,))


def round_of(plan: Plan, point: Point) -> dict[str, Any]:
    """Fields of the manifest: what `xpeer plan` recommends for this link and step."""
    link = link_plan.Bandwidth(min(point.mbit_per_s, 1e5) * 1e6, 2 * point.delay_s)
    found = link_plan.plan(link, num_params=plan.num_params, step_s=plan.step_s, peers=2)
    say(found.why)
    return {
        "round.fragments": found.fragments,
        "round.window_steps": found.window_steps,
        "round.slot_s": found.slot_s,
        "round.codec": found.codec,
        "end.steps": 1_000_000,
        "optimiser.sequence_tokens": 64,
    }


def measure(plan: Plan, point: Point, wires: Wire, folder: Path) -> dict[str, Any]:
    """One peer alone, then both with the link between them."""
    first, second = peers = [
        Peer(folder, name, host, address)
        for name, host, address in zip("ab", wires.hosts, wires.addresses, strict=True)
    ]
    rules = round_of(plan, point)
    first.found(plan.model, rules)
    timeout_s = 3 * plan.step_s * plan.steps + 60
    with first.running(plan.step_s):
        first.measure(plan.steps, timeout_s)
        alone = timeline.shares(first.rows()[-plan.steps - 1 :])
        say(f"{point}, alone: {alone.steps_per_s:.4f} steps/s")
        second.prepare(first.invite(second))
        with second.running(plan.step_s):  # fetches the parameters at full speed
            second.measure(2, timeout_s)
            wires.shape(point.mbit_per_s, point.delay_s)
            for peer in peers:
                peer.warm_up(WARM_UP_MERGES)
            began, before = time.time(), wires.carried()
            first.measure(plan.steps, timeout_s)
            ended, after = time.time(), wires.carried()
            statuses = [peer.status() for peer in peers]
            rows = [[r for r in peer.rows() if began <= r.at <= ended] for peer in peers]
            copy_s = first.checkpoint_s() if point == PROMISED else None
    together = [timeline.shares(each) for each in rows]
    for shares in together:
        say(f"{point}: {shares}")
    return {
        "rules": rules,
        "alone": asdict(alone),
        "together": [asdict(shares) for shares in together],
        "utilisation": [shares.steps_per_s / alone.steps_per_s for shares in together],
        "failed": [status.exchanges_failed if status else {} for status in statuses],
        "link": {key: (after[key] - before[key]) / (ended - began) for key in after},
        "checkpoint_copy_s": copy_s,
        "timeline_ms": timeline.milliseconds(rows[0]),
    }


def summary_of(found: dict[str, Any]) -> dict[str, Any]:
    """The keys that the docs name, of the slower peer on the promised link."""
    measured = found[str(PROMISED)]
    together = measured["together"]
    copied = [each["snapshot"] + each["merge"] for each in together]
    seconds = sum(each["seconds"] * share for each, share in zip(together, copied, strict=True))
    merges = sum(each["merges"] for each in together)
    return {
        "utilisation": round(min(measured["utilisation"]), 4),
        "blocked_share": round(max(each["blocked"] for each in together), 6),
        "merge_share": round(max(copied), 4),
        "off_core_share": round(max(each["off_core"] for each in together), 4),
        "exchanges_per_step": round(merges / sum(each["steps"] for each in together), 3),
        "merge_ms_per_exchange": round(1e3 * seconds / merges, 2),
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Training beside exchanges.")
    parser.add_argument("--quick", action="store_true", help="a small model, one link")
    quick = parser.parse_args().quick
    plan = QUICK if quick else FULL
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # daemons and hosts go, too
    points: dict[str, Any] = {}
    for point in plan.points:
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            try:
                wires = stack.enter_context(wire.laid())
            except (OSError, subprocess.CalledProcessError) as e:
                raise SystemExit(f"{COMMAND} needs root, iproute2 and /dev/net/tun: {e}") from e
            points[str(point)] = measure(plan, point, wires, folder)
    summary = summary_of(points)
    if not quick:
        path = write_result("overlap", summary, {"step_s": plan.step_s, "points": points}, COMMAND)
        draw(points, str(PROMISED), path.with_suffix(".png"))
    emit("overlap", summary)


if __name__ == "__main__":
    main()
