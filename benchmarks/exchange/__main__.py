"""See the package. Writes results/exchange.json and .png, and one line of JSON to stdout."""

from __future__ import annotations

import argparse
import asyncio
import sys
from typing import Any

from benchmarks import common
from benchmarks.exchange import measure
from benchmarks.exchange.hosts import can_shape
from benchmarks.exchange.measure import Averaged
from benchmarks.exchange.plot import draw
from xpeer.wire.codec import encoded_bytes

COMMAND = "python -m benchmarks.exchange"
FULL = {"params": 100_000_000, "groups": [2, 4], "links": [100.0, 500.0], "repeats": 5}
QUICK = {"params": 10_000_000, "groups": [2], "links": [500.0], "repeats": 2}
HIVEMIND = {"min_matchmaking_time": 1.0, "request_timeout": 0.5, "part_size_bytes": 1 << 20}
"""The best that we found: groups form as soon as they are full, whatever the matchmaking time."""
BULK_BYTES = 400 << 20


async def measure_all(plan: dict[str, Any]) -> dict[str, Any]:
    """Everything, one thing after another."""
    params, repeats = plan["params"], plan["repeats"]
    bulk = min(BULK_BYTES, 4 * params >> 20 << 20)
    found: dict[str, Any] = {"averaging_s": {}, "links_mb_s": {}, "shaped": {}}
    for count in plan["groups"]:
        for codec in ("float16", "float32"):
            run = await measure.averaged_by_hivemind(count, codec, params, repeats, HIVEMIND)
            note(found["averaging_s"], f"hivemind {codec}, {count} peers", run)
        for direct in (False, True):
            runs = await measure.averaged_by_us(
                count, ["int8", "bfloat16", "float32"], params, repeats, direct=direct
            )
            way = "direct" if direct else "libp2p"
            for codec, run in runs.items():
                note(found["averaging_s"], f"xpeer {codec}, {count} peers, {way}", run)
    for link in ("p2pd", "tcp"):
        for how in ("streams", "threads"):
            rate = await measure.raw(link, how, bulk, repeats)
            note_rate(found["links_mb_s"], f"raw {link}, {how}", rate)
    for direct in (False, True):
        rate = await measure.our_bulk(bulk, repeats, direct=direct)
        note_rate(found["links_mb_s"], f"xpeer, {'direct' if direct else 'libp2p'}", rate)
    if not can_shape():
        say("no shaped links: they need root, iproute2 and tbf")
        return found
    for mbit in plan["links"]:
        found["shaped"][f"{mbit:g}"] = await shaped(mbit, params)
    return found


async def shaped(mbit: float, params: int) -> dict[str, Any]:
    """Two peers on a shaped link: int8 swapped both ways, hivemind beside it, and raw streams."""
    of_link = 8e-6 / mbit
    found: dict[str, Any] = {}
    payload = encoded_bytes("int8", params)
    for direct in (False, True):
        way = "direct" if direct else "libp2p"
        runs = await measure.averaged_by_us(2, ["int8"], params, 2, direct=direct, mbit_per_s=mbit)
        note(found, f"xpeer int8, {way}", runs["int8"])
        found[f"goodput, {way}"] = payload / runs["int8"].swap_s * of_link
        say(f"  {found[f'goodput, {way}']:.3f} of the link")
    run = await measure.averaged_by_hivemind(2, "float16", params, 1, HIVEMIND, mbit)
    note(found, "hivemind float16", run)
    for link in ("p2pd", "tcp"):
        rate = await measure.raw(link, "streams", payload >> 20 << 20, 1, mbit)
        found[f"raw {link}"] = rate * of_link
        say(f"{mbit:g} Mbit/s, raw {link}: {rate * of_link:.3f} of the link")
    return found


def summary_of(found: dict[str, Any], plan: dict[str, Any]) -> dict[str, float | None]:
    """The keys that the docs name; None for what a quick run leaves out."""
    seconds = {name: run["median_s"] for name, run in found["averaging_s"].items()}
    rates = found["links_mb_s"]
    summary: dict[str, float | None] = {}
    for count in (2, 4):
        here = count in plan["groups"]
        for way, mark in (("direct", ""), ("libp2p", "_libp2p")):
            best = min(
                (seconds[f"hivemind {c}, {count} peers"] for c in ("float16", "float32") if here),
                default=None,
            )
            ours = seconds.get(f"xpeer int8, {count} peers, {way}")
            ours16 = seconds.get(f"xpeer bfloat16, {count} peers, {way}")
            theirs16 = seconds.get(f"hivemind float16, {count} peers")
            summary[f"speedup_int8_{count}{mark}"] = best / ours if best and ours else None
            summary[f"speedup_16bit_{count}{mark}"] = (
                theirs16 / ours16 if theirs16 and ours16 else None
            )
    for mbit in (100, 500):
        link = found["shaped"].get(str(mbit), {})
        summary[f"goodput_{mbit}mbit"] = link.get("goodput, libp2p")
        summary[f"goodput_{mbit}mbit_direct"] = link.get("goodput, direct")
    raw = max(rates["raw p2pd, streams"], rates["raw p2pd, threads"])
    summary["of_raw_stream"] = rates["xpeer, libp2p"] / raw
    summary["direct_of_raw_stream"] = rates["xpeer, direct"] / raw
    return {key: round(value, 3) if value else value for key, value in summary.items()}


def note(found: dict[str, Any], name: str, run: Averaged) -> None:
    """Keep it, and say it."""
    found[name] = {
        "median_s": run.median_s,
        "runs_s": run.seconds,
        "worst_error": run.worst_error,
        "stages_s": run.stages,
    }
    say(f"{name}: {run.median_s:.3f} s, error {run.worst_error:.1e}, {run.stages}")


def note_rate(found: dict[str, Any], name: str, rate: float) -> None:
    """Keep it, and say it."""
    found[name] = rate / 1e6
    say(f"{name}: {rate / 1e6:.0f} MB/s")


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Averaging, end to end.")
    parser.add_argument("--quick", action="store_true", help="a tenth of the model, one link")
    quick = parser.parse_args().quick
    plan = QUICK if quick else FULL
    found = asyncio.run(measure_all(plan))
    summary = summary_of(found, plan)
    details = {"plan": plan, "hivemind_settings": HIVEMIND, **found}
    if not quick:
        path = common.write_result("exchange", summary, details, COMMAND)
        draw(details, path.with_suffix(".png"))
    common.emit(summary)


if __name__ == "__main__":
    main()
