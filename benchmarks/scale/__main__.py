"""`python -m benchmarks.scale [--quick]`: figures of many peers, one line of JSON at the end."""

from __future__ import annotations

import argparse
import asyncio
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.scale import consensus, rig, rosters
from benchmarks.scale.figures import draw

SIZES = [4, 8, 16, 32, 64, 128, 256]
ROSTER_SIZES = [4, 8, 16, 32, 64, 128]
QUICK_SIZES = [4, 32]


def main() -> None:
    """Run all three parts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="under two minutes; writes no results")
    parser.add_argument("--no-rig", action="store_true", help="no real peers")
    options = parser.parse_args()
    if not options.no_rig:
        rig.enter_namespace()
    torch.set_num_threads(1)
    details = measure(quick=options.quick, with_rig=not options.no_rig)
    summary = summarise(details)
    if not options.quick and not options.no_rig:
        common.write_result("scale", summary, details, "python -m benchmarks.scale")
        draw(details, Path(__file__).parents[1] / "results" / "scale.png")
    common.emit("scale", summary)


def measure(*, quick: bool, with_rig: bool) -> dict[str, Any]:
    """Simulators first, then the rig."""
    details: dict[str, Any] = {
        "matching_ms": {str(n): consensus.matching_ms(n) for n in (32, 256, 1024, 4096)},
        "consensus": consensus.table(QUICK_SIZES if quick else SIZES, 1 if quick else 3),
    }
    _say("consensus: done")
    sizes = QUICK_SIZES if quick else ROSTER_SIZES
    details["rosters"] = [asdict(asyncio.run(rosters.measure(n, minutes=1.0))) for n in sizes]
    _say("simulated rosters: done")
    if with_rig:
        plan = (
            rig.Plan(peers=8, processes=2, meeting_s=24, idle_s=10, exchange_s=12)
            if quick
            else rig.Plan()
        )
        details["rig"] = asyncio.run(rig.run(plan))
    return details


def summarise(details: dict[str, Any]) -> dict[str, Any]:
    """The keys of the issue, and what goes with them."""
    at_32 = next(r for r in details["consensus"] if (r["peers"], r["k"], r["zones"]) == (32, 2, 0))
    summary: dict[str, Any] = {
        "matching_ms_256": round(details["matching_ms"]["256"], 3),
        "consensus_slots_32": at_32["slots"],
    }
    found = details.get("rig")
    if found is not None:
        idle, exchanging = found["idle"], found["exchange"]
        daemon, sidecar = idle["daemon_cpu_per_peer"], idle["sidecar_cpu_per_peer"]
        summary |= {
            "peers": found["peers"],
            "accounted_share": found["accounts"]["accounted_share"],
            "disagreement_s": found["disagreement"]["longest_s"],
            "cpu_per_idle_peer": round(daemon + sidecar, 4),
            "daemon_cpu_per_idle_peer": round(daemon, 4),
            "sidecar_cpu_per_idle_peer": round(sidecar, 4),
            "control_bytes_per_peer_minute": round(exchanging["control_bytes_per_peer_minute"]),
            "idle_bytes_per_peer_minute": round(idle["control_bytes_per_peer_minute"]),
        }
    return summary


def _say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
