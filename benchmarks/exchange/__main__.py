"""See the package. Writes results/exchange.json and .png, and one line of JSON to stdout."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import statistics
import sys
from typing import Any

from benchmarks import common
from benchmarks.exchange import measure
from benchmarks.exchange.hosts import Host, can_shape, hosts
from benchmarks.exchange.plot import draw
from xpeer.forms import Form

COMMAND = "python -m benchmarks.exchange"
FULL = {"params": 100_000_000, "groups": [2, 4], "links": [100.0, 500.0], "repeats": 5}
QUICK = {"params": 10_000_000, "groups": [2], "links": [500.0], "repeats": 2}
HIVEMIND = {"min_matchmaking_time": 1.0, "request_timeout": 0.5, "part_size_bytes": 1 << 20}
"""The best that we found: groups form as soon as they are full, whatever the matchmaking time."""
THEIRS = ["float16", "float32"]
"""hivemind's codecs that work; between four peers the one that won between two, alone."""
PAIR = 2
BULK_BYTES = 400 << 20


async def measure_all(plan: dict[str, Any]) -> dict[str, Any]:
    """Everything; what is compared takes turns."""
    found: dict[str, Any] = {"averaging": {}, "links_mb_s": {}, "shaped": {}}
    for count in plan["groups"]:
        with hosts(count, None) as machines:
            found["averaging"][str(count)] = await averaging(
                machines, THEIRS if count == PAIR else THEIRS[:1], ["int8", "bfloat16"], plan
            )
    with hosts(2, None) as machines:
        rates = await measure.links(machines, bulk_bytes(plan), plan["repeats"], shaped=False)
    found["links_mb_s"] = {name: rate / 1e6 for name, rate in rates.items()}
    say(f"{found['links_mb_s']}")
    if not can_shape():
        say("no shaped links: they need root, iproute2 and tbf")
        return found
    for mbit in plan["links"]:
        with hosts(2, mbit) as machines:
            found["shaped"][f"{mbit:g}"] = await shaped(machines, mbit, plan)
    return found


async def averaging(
    machines: list[Host], theirs: list[str], codecs: list[str], plan: dict[str, Any]
) -> dict[str, Any]:
    """All contenders between these hosts."""
    params = plan["params"]
    async with contextlib.AsyncExitStack() as stack:
        contenders = {}
        for codec in theirs:
            entering = measure.hivemind(machines, codec, params, HIVEMIND)
            contenders[f"hivemind {codec}"] = await stack.enter_async_context(entering)
        for direct in (True, False):
            entered = measure.ours(machines, codecs, params, direct=direct)
            for codec, contender in (await stack.enter_async_context(entered)).items():
                contenders[f"xpeer {codec}, {'direct' if direct else 'libp2p'}"] = contender
        runs = await measure.take_turns(contenders, plan["repeats"])
    for name, run in runs.items():
        say(f"{len(machines)} peers, {name}: {run.median_s:.3f} s, error {run.worst_error:.1e}")
        say(f"    {[round(s, 3) for s in run.seconds]} {run.stages}")
    return {name: {"median_s": run.median_s, **vars(run)} for name, run in runs.items()}


async def shaped(machines: list[Host], mbit: float, plan: dict[str, Any]) -> dict[str, Any]:
    """Averaging on shaped links, and the share of the link's rate that payloads got."""
    plan = {**plan, "repeats": min(2, plan["repeats"])}
    found: dict[str, Any] = {"averaging": await averaging(machines, ["float16"], ["int8"], plan)}
    payload = Form("int8", plan["params"]).num_bytes
    shares = {
        name: payload / statistics.median(run["swaps"])
        for name, run in found["averaging"].items()
        if run["swaps"]
    }
    shares |= await measure.links(machines, payload >> 20 << 20, plan["repeats"], shaped=True)
    found["shares"] = {name: rate * 8e-6 / mbit for name, rate in shares.items()}
    say(f"{mbit:g} Mbit/s: {found['shares']}")
    return found


def bulk_bytes(plan: dict[str, Any]) -> int:
    """Of one transfer over a bare link, in whole MiB."""
    return max(min(BULK_BYTES, 4 * int(plan["params"])) >> 20, 1) << 20


def summary_of(found: dict[str, Any], plan: dict[str, Any]) -> dict[str, float | None]:
    """The keys that the docs name; None for what a quick run leaves out."""
    summary: dict[str, float | None] = {}
    for count in (2, 4):
        runs = found["averaging"].get(str(count), {})
        seconds = {name: run["median_s"] for name, run in runs.items()}
        for way, mark in (("direct", ""), ("libp2p", "_libp2p")):
            int8 = int16 = None
            if seconds:
                best = min(s for name, s in seconds.items() if name.startswith("hivemind"))
                int8 = best / seconds[f"xpeer int8, {way}"]
                int16 = seconds["hivemind float16"] / seconds[f"xpeer bfloat16, {way}"]
            summary[f"speedup_int8_{count}{mark}"] = int8
            summary[f"speedup_16bit_{count}{mark}"] = int16
    for mbit in (100, 500):
        shares = found["shaped"].get(str(mbit), {}).get("shares", {})
        for way, raw_link, mark in (("libp2p", "p2pd", ""), ("direct", "tcp", "_direct")):
            summary[f"goodput_{mbit}mbit{mark}"] = shares.get(f"xpeer, {way}")
            summary[f"both_ways_{mbit}mbit{mark}"] = shares.get(f"xpeer int8, {way}")
            summary[f"raw_both_ways_{mbit}mbit{mark}"] = shares.get(f"raw {raw_link}, both ways")
    rates = found["links_mb_s"]
    raw = max(rates["raw p2pd, streams"], rates["raw p2pd, threads"])
    summary["of_raw_stream"] = rates["xpeer, libp2p"] / raw
    summary["of_raw_stream_direct"] = rates["xpeer, direct"] / raw
    return {key: value and round(value, 3) for key, value in summary.items()}


def say(line: str) -> None:
    """Progress."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog=COMMAND, description="Averaging, end to end.")
    parser.add_argument("--quick", action="store_true", help="a tenth of the model, one link")
    quick = parser.parse_args().quick
    plan = QUICK if quick else FULL
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # children and namespaces go, too
    found = asyncio.run(measure_all(plan))
    summary = summary_of(found, plan)
    details = {"plan": plan, "hivemind_settings": HIVEMIND, **found}
    if not quick:
        path = common.write_result("exchange", summary, details, COMMAND)
        draw(details, path.with_suffix(".png"))
    common.emit("exchange", summary)


if __name__ == "__main__":
    main()
