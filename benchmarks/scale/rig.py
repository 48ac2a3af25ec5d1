"""Real networked peers on one machine: are exchanges accounted for, do rosters agree, what is idle?

Several peers to a process, each with its own sidecar; nothing but loopback. Where the system lets
us, all of it runs in a network namespace of its own, whose loopback counters then hold this rig's
traffic and nobody else's, headers of TCP and IP included. Each byte is counted once, as sent.

    joining   all start; until every roster lists everybody
    meeting   every pair of the matching exchanges in every slot; a third into it one peer dies
              without a word, at two thirds another joins. Most pairs dial, introduce themselves and
              open a session once, here
    idle      nobody exchanges
    exchange  as in meeting, between peers that have met
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.scale.peers import DEADLINE_S
from xpeer.identity import Identity

MARK = "XPEER_BENCH_NAMESPACE"
ROOT = Path(__file__).parents[2]
COUNTERS = ("peers", "daemon_s", "sidecar_s", "exchanges", "payload_bytes")


@dataclass(frozen=True)
class Plan:
    """How large and how long."""

    peers: int = 32
    processes: int = 4
    slot_s: float = 4.0
    """The default manifest's pace (20 steps, 5 fragments) at a step of one second."""
    meeting_s: float = 240.0
    idle_s: float = 90.0
    exchange_s: float = 150.0
    joining_s: float = 90.0
    """At most."""


def enter_namespace() -> None:
    """Run this command again in a network namespace of its own, if the system lets us."""
    if MARK in os.environ or shutil.which("unshare") is None:
        return
    script = 'ip link set lo up && exec "$@"'
    os.environ[MARK] = "tried"
    probe = ["unshare", "-rn", "sh", "-c", "ip link set lo up"]
    if subprocess.run(probe, check=False, capture_output=True).returncode == 0:
        os.environ[MARK] = "inside"
        again = [sys.executable, "-m", "benchmarks.scale", *sys.argv[1:]]
        os.execvp("unshare", ["unshare", "-rn", "sh", "-c", script, "sh", *again])  # noqa: S606, S607


async def run(plan: Plan) -> dict[str, Any]:
    """The whole of it; figures as they are."""
    admin = Identity.generate()
    workers = [await _spawn() for _ in range(plan.processes)]
    try:
        return await _measure(plan, admin, workers)
    finally:
        await asyncio.gather(*(_end(worker) for worker in workers))


async def _measure(
    plan: Plan, admin: Identity, workers: list[asyncio.subprocess.Process]
) -> dict[str, Any]:
    base: dict[str, Any] = {
        "do": "start", "admin": admin.to_libp2p().hex(), "slot_s": plan.slot_s
    }  # fmt: skip
    numbers = [list(range(i, plan.peers, plan.processes)) for i in range(plan.processes)]
    [seed, *_] = (await _ask(workers[0], base | {"numbers": numbers[0][:1], "seeds": []}))[
        "addresses"
    ]
    numbers[0] = numbers[0][1:]
    began = time.time()
    await asyncio.gather(
        *(
            _ask(w, base | {"numbers": mine, "seeds": [seed]})
            for w, mine in zip(workers, numbers, strict=True)
        )
    )
    started_s = time.time() - began
    joined = await _until_agreed(workers, plan.peers, plan.joining_s)
    print(f"joined after {joined - began:.0f} s", file=sys.stderr)

    start = await _counters(workers)
    await _all(workers, {"do": "exchange"})
    events = await _meet(plan, workers, seed)
    met = await _pause(workers)
    await asyncio.sleep(plan.idle_s)
    rested = await _counters(workers)
    print("idle: measured", file=sys.stderr)
    await _all(workers, {"do": "exchange"})
    await asyncio.sleep(plan.exchange_s)
    last = await _pause(workers)
    told = await _all(workers, {"do": "counts"})
    return {
        "peers": plan.peers,
        "slot_s": plan.slot_s,
        "isolated": os.environ.get(MARK) == "inside",
        "started_s": started_s,
        "joined_s": joined - began,
        "meeting": _rates(start, met),
        "idle": _rates(met, rested),
        "exchange": _rates(rested, last),
        "accounts": account([peer for answer in told for peer in answer["peers"]]),
        "disagreement": disagreement([answer["views"] for answer in told], int(joined)),
        "events": {name: at - joined for name, at in events.items()},
    }


async def _meet(
    plan: Plan, workers: list[asyncio.subprocess.Process], seed: str
) -> dict[str, float]:
    """One dies without a word, another joins; when."""
    third = plan.meeting_s / 3
    await asyncio.sleep(third)
    killed = time.time()
    await _ask(workers[-1], {"do": "kill"})
    await asyncio.sleep(third)
    added = time.time()
    await _ask(workers[0], {"do": "add", "number": plan.peers, "seeds": [seed]})
    await asyncio.sleep(third)
    return {"killed_s": killed, "added_s": added}


async def _pause(workers: list[asyncio.subprocess.Process]) -> dict[str, Any]:
    """End exchanging; counters once nothing is in flight."""
    await _all(workers, {"do": "pause"})
    await asyncio.sleep(DEADLINE_S + 2)
    return await _counters(workers)


def account(counts: list[dict[str, Any]]) -> dict[str, Any]:
    """Both sides' books, compared by exchange id."""
    sides: dict[int, list[str]] = {}
    unended = 0
    for peer in counts:
        merged, dropped = set(peer["merged"]), set(peer["dropped"])
        for exchange_id in peer["begun"]:
            merges = exchange_id in merged
            unended += not merges and exchange_id not in dropped
            sides.setdefault(exchange_id, []).append("merged" if merges else "dropped")
    one_sided = sum("merged" in s and s != ["merged", "merged"] for s in sides.values())
    reasons: Counter[str] = Counter()
    for peer in counts:
        reasons.update(peer["skipped"])
    dropped_sides = sum(s.count("dropped") for s in sides.values())
    told = sum(peer["told_one_sided"] for peer in counts)
    unaccounted = unended + max(0, one_sided - told) + max(0, dropped_sides - reasons.total())
    return {
        "begun": len(sides),
        "merged_on_both_sides": sum(s == ["merged", "merged"] for s in sides.values()),
        "merged_on_one_side": one_sided,
        "told_of_one_side": told,
        "given_up_sides": dropped_sides,
        "without_an_end": unended,
        "reasons": dict(reasons),
        "accounted_share": 1 - unaccounted / max(1, len(sides)),
    }


def disagreement(views: list[dict[str, dict[str, str]]], since: int) -> dict[str, Any]:
    """Runs of seconds in which not all live peers listed the same members."""
    by_second: dict[int, set[str]] = {}
    for worker in views:
        for second, lists in worker.items():
            by_second.setdefault(int(second), set()).update(lists.values())
    runs, length = [], 0
    for at in range(since, max(by_second) + 1):
        if len(by_second.get(at, ())) > 1:
            length += 1
        elif length:
            runs.append(length)
            length = 0
    runs += [length] if length else []
    return {"longest_s": max(runs, default=0), "runs_s": runs}


def _rates(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """For each peer: bytes and packets sent in a minute, exchanges, and shares of a core."""
    seconds, peers = after["at"] - before["at"], before["peers"]

    def rate(name: str) -> float:
        return float((after[name] - before[name]) / peers / seconds)

    exchanges = 60 * rate("exchanges")
    control = 60 * (rate("bytes") - rate("payload_bytes"))
    return {
        "seconds": seconds,
        "control_bytes_per_peer_minute": control,
        "payload_bytes_per_peer_minute": 60 * rate("payload_bytes"),
        "packets_per_peer_minute": 60 * rate("packets"),
        "exchanges_per_peer_minute": exchanges,
        "daemon_cpu_per_peer": rate("daemon_s"),
        "sidecar_cpu_per_peer": rate("sidecar_s"),
    }


async def _until_agreed(
    workers: list[asyncio.subprocess.Process], peers: int, longest_s: float
) -> float:
    """When all first listed the same; or now, if it takes too long."""
    began = time.time()
    while time.time() - began < longest_s:
        await asyncio.sleep(2)
        told = await _all(workers, {"do": "counts"})
        last = min(max(map(int, answer["views"])) for answer in told) - 1
        now = [answer["views"].get(str(last), {}) for answer in told]
        if sum(map(len, now)) == peers and len({v for views in now for v in views.values()}) == 1:
            return float(last)
    return time.time()


async def _counters(workers: list[asyncio.subprocess.Process]) -> dict[str, Any]:
    told = await _all(workers, {"do": "counters"})
    return {
        "at": time.time(),
        **_sent_on_loopback(),
        **{name: sum(t[name] for t in told) for name in COUNTERS},
    }


def _sent_on_loopback() -> dict[str, int]:
    """As the kernel counts it: proc(5), /proc/net/dev."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    fields = next(line for line in lines if "lo:" in line).partition(":")[2].split()
    return {"bytes": int(fields[8]), "packets": int(fields[9])}


async def _spawn() -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.scale.worker", cwd=ROOT, limit=1 << 26,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip


async def _ask(worker: asyncio.subprocess.Process, order: dict[str, Any]) -> dict[str, Any]:
    if worker.stdin is None or worker.stdout is None:
        raise RuntimeError("a worker without pipes")
    worker.stdin.write(json.dumps(order).encode() + b"\n")
    line = await worker.stdout.readline()
    if not line:
        raise RuntimeError(f"a process of the rig ended while it should {order['do']}")
    answer: dict[str, Any] = json.loads(line)
    return answer


async def _all(
    workers: list[asyncio.subprocess.Process], order: dict[str, Any]
) -> list[dict[str, Any]]:
    return await asyncio.gather(*(_ask(worker, order) for worker in workers))


async def _end(worker: asyncio.subprocess.Process) -> None:
    if worker.stdin is not None:
        worker.stdin.close()
    try:
        async with asyncio.timeout(20):
            await worker.wait()
    except TimeoutError:
        worker.kill()
        await worker.wait()
