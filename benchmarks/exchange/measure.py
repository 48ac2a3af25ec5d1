"""One measurement each: start the peers, tell them what to do, take the time."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.exchange.hosts import Child, hosts
from xpeer.identity import Identity
from xpeer.manifest import Genesis
from xpeer.network.invites import grant
from xpeer.network.membership import Credential

LEAD_S = 0.5
"""Between telling the peers to begin and the moment they do."""


@dataclass(frozen=True)
class Averaged:
    """One way of averaging, several times."""

    seconds: list[float]
    """From the request to the last peer's merge."""
    worst_error: float
    """Largest difference from the exact mean, of the values shown."""
    stages: dict[str, float]
    """Seconds of the last run's slowest peer, by stage; ours only."""

    swap_s: float = 0.0
    """Median over runs and peers, from a snapshot's end to the partner's whole payload; ours."""

    @property
    def median_s(self) -> float:
        """Of the runs."""
        return statistics.median(self.seconds)


async def averaged_by_us(
    count: int,
    codecs: list[str],
    num_params: int,
    repeats: int,
    *,
    direct: bool,
    mbit_per_s: float | None = None,
) -> dict[str, Averaged]:
    """Two peers in one exchange, or 2**r peers in r rounds of pairs (a hypercube: exact)."""
    async with our_peers(count, direct=direct, mbit_per_s=mbit_per_s) as peers:
        order = sorted(range(count), key=lambda i: peers[i].peer_id)
        rounds = [1 << r for r in range(count.bit_length() - 1)]
        requests = []
        for place, i in enumerate(order):
            partners = [peers[order[place ^ bit]].peer_id for bit in rounds]
            requests.append((peers[i].child, {"command": "average", "partners": partners}))
        return {
            codec: await _averaged(
                requests, {"command": "prepare", "num_params": num_params, "codec": codec}, repeats
            )
            for codec in codecs
        }


async def averaged_by_hivemind(
    count: int,
    codec: str,
    num_params: int,
    repeats: int,
    settings: dict[str, Any],
    mbit_per_s: float | None = None,
) -> Averaged:
    """The same by hivemind's DecentralizedAverager, its matchmaking included."""
    async with contextlib.AsyncExitStack() as stack:
        children: list[Child] = []
        seeds: list[str] = []
        for rank, host in enumerate(stack.enter_context(hosts(count, mbit_per_s))):
            child, started = await stack.enter_async_context(
                Child.running(
                    host,
                    "averager",
                    rank=rank,
                    seeds=seeds,
                    group=count,
                    codec=codec,
                    num_params=num_params,
                    settings=settings,
                )
            )
            seeds = seeds or started["addresses"]
            children.append(child)
        return await _averaged([(child, {}) for child in children], {}, repeats)


async def _averaged(
    requests: list[tuple[Child, dict[str, Any]]], prepare: dict[str, Any], repeats: int
) -> Averaged:
    seconds, error, stages, swaps = [], 0.0, {}, [0.0]
    for number in range(repeats + 1):  # the first one warms up, and opens the links
        before = [
            np.array((await child.ask(**prepare, **({"rank": rank} if prepare else {})))["shown"])
            for rank, (child, _) in enumerate(requests)
        ]
        at = time.time() + LEAD_S
        answers = await Child.ask_all([(child, {**ask, "at": at}) for child, ask in requests])
        after = [np.array(answer["shown"]) for answer in answers]
        exact = np.mean(before, axis=0)
        error = max(error, *(float(np.abs(values - exact).max()) for values in after))
        if any(answer.get("group", len(requests)) != len(requests) for answer in answers):
            raise RuntimeError("hivemind averaged in a smaller group")
        if number:
            last = max(answers, key=lambda answer: float(answer["finished"]))
            seconds.append(float(last["finished"]) - at)
            stages = last.get("seconds", {})
            swaps += [answer["seconds"]["swap"] for answer in answers if "seconds" in answer]
    return Averaged(seconds, error, stages, statistics.median(swaps[1:] or swaps))


@dataclass(frozen=True)
class OurPeer:
    """A child of ours, and its name."""

    child: Child
    peer_id: str


@contextlib.asynccontextmanager
async def our_peers(
    count: int, *, direct: bool, mbit_per_s: float | None
) -> AsyncIterator[list[OurPeer]]:
    """Members of a new swarm that know one another."""
    admin = Identity.generate()
    genesis = Genesis(admin.verify_key, b"h" * 32)
    async with contextlib.AsyncExitStack() as stack:
        peers: list[OurPeer] = []
        seeds: list[str] = []
        known: list[str] = []
        for host in stack.enter_context(hosts(count, mbit_per_s)):
            identity = Identity.generate()
            certificate = grant(genesis, identity.peer_id, "member", 3600.0, time.time())
            credential = Credential.issue(admin, certificate, identity.peer_id)
            child, started = await stack.enter_async_context(
                Child.running(
                    host,
                    "ours",
                    identity=identity.to_libp2p().hex(),
                    credential=credential.to_bytes().hex(),
                    swarm_id=genesis.swarm_id,
                    seeds=seeds,
                    direct=direct,
                )
            )
            seeds = seeds or started["addresses"]
            known += started["addresses"]
            peers.append(OurPeer(child, started["peer_id"]))
        for peer in peers:
            await peer.child.ask(command="learn", addresses=known)
        yield peers


async def our_bulk(
    num_bytes: int, repeats: int, *, direct: bool, mbit_per_s: float | None = None
) -> float:
    """Bytes per second through a sealed link, one way, until the partner's word: the median."""
    async with our_peers(2, direct=direct, mbit_per_s=mbit_per_s) as (one, other):
        ask = {"command": "bulk", "to": other.peer_id, "num_bytes": num_bytes}
        answer = await one.child.ask(**ask, repeats=repeats + 2)  # a link tries each stream once
        assert answer["direct"] == direct
        return num_bytes / float(statistics.median(answer["seconds"][2:]))


async def raw(
    link: str, how: str, num_bytes: int, repeats: int, mbit_per_s: float | None = None
) -> float:
    """Bytes per second through a p2pd stream or a TCP connection, unsealed, one way: the median."""
    async with contextlib.AsyncExitStack() as stack:
        ends = [
            await stack.enter_async_context(Child.running(host, "raw"))
            for host in stack.enter_context(hosts(2, mbit_per_s))
        ]
        (one, _), (_, to) = ends
        ask = {"to": to, "link": link, "how": how, "num_bytes": num_bytes}
        answer = await one.ask(**ask, repeats=repeats + 1)
        return num_bytes / float(statistics.median(answer["seconds"][1:]))
