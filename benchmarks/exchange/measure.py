"""One measurement each: start the peers, tell them what to do, take the time."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.exchange.hosts import Child, Host
from xpeer.identity import Identity
from xpeer.manifest.signed import Genesis
from xpeer.network.membership.certificates import Credential
from xpeer.network.membership.invites import grant

LEAD_S = 0.5
"""Between telling the peers to begin and the moment they do."""


@dataclass
class Averaged:
    """One way of averaging, several times."""

    seconds: list[float] = field(default_factory=list)
    """From the request to the last peer's merge."""
    worst_error: float = 0.0
    """Largest difference from the exact mean, of the values shown."""
    stages: dict[str, float] = field(default_factory=dict)
    """Seconds of the last run's slowest peer, by stage; ours only."""
    swaps: list[float] = field(default_factory=list)
    """Seconds from a snapshot's end to the partner's whole payload, each peer and run; ours."""

    @property
    def median_s(self) -> float:
        """Of the runs."""
        return statistics.median(self.seconds)


class Contender:
    """Peers that wait for their turn to average.

    Args:
        requests: a child and its command, for each peer by rank.
        prepare: the command that sets a child's values anew.
    """

    def __init__(
        self, requests: list[tuple[Child, dict[str, Any]]], prepare: dict[str, Any]
    ) -> None:
        self._requests = requests
        self._prepare = prepare
        self.found = Averaged()

    async def run(self, *, warm_up: bool) -> None:
        """Average once; the first time opens the links, and is not counted."""
        ready = await Child.ask_all(
            [(child, {**self._prepare, "rank": i}) for i, (child, _) in enumerate(self._requests)]
        )
        at = time.time() + LEAD_S
        answers = await Child.ask_all([(c, {**ask, "at": at}) for c, ask in self._requests])
        if any(answer.get("group", len(answers)) != len(answers) for answer in answers):
            raise RuntimeError("hivemind averaged in a smaller group")
        exact = np.mean([answer["shown"] for answer in ready], axis=0)
        errors = (float(np.abs(np.array(answer["shown"]) - exact).max()) for answer in answers)
        found = self.found
        found.worst_error = max(found.worst_error, *errors)
        if not warm_up:
            last = max(answers, key=lambda answer: float(answer["finished"]))
            found.seconds.append(float(last["finished"]) - at)
            found.stages = last.get("seconds", {})
            found.swaps += [answer["seconds"]["swap"] for answer in answers if "seconds" in answer]


async def take_turns(contenders: dict[str, Contender], repeats: int) -> dict[str, Averaged]:
    """Every contender in every round, so that a machine that is busy meanwhile is so for all."""
    for number in range(repeats + 2):  # a link tries each of its streams once
        for contender in contenders.values():
            await contender.run(warm_up=number < 2)
    return {name: contender.found for name, contender in contenders.items()}


@contextlib.asynccontextmanager
async def ours(
    machines: list[Host], codecs: list[str], num_params: int, *, direct: bool
) -> AsyncIterator[dict[str, Contender]]:
    """Two peers in one exchange, or 2**r peers in r rounds of pairs (a hypercube: exact)."""
    async with our_peers(machines, direct=direct) as peers:
        order = sorted(range(len(peers)), key=lambda i: peers[i].peer_id)
        requests: list[tuple[Child, dict[str, Any]]] = []
        for place, i in enumerate(order):
            bits = [1 << r for r in range(len(peers).bit_length() - 1)]
            partners = [peers[order[place ^ bit]].peer_id for bit in bits]
            requests.append((peers[i].child, {"command": "average", "partners": partners}))
        prepare = {"command": "prepare", "num_params": num_params}
        yield {codec: Contender(requests, {**prepare, "codec": codec}) for codec in codecs}


@contextlib.asynccontextmanager
async def hivemind(
    machines: list[Host], codec: str, num_params: int, settings: dict[str, Any]
) -> AsyncIterator[Contender]:
    """The same by hivemind's DecentralizedAverager, its matchmaking included."""
    config = {"group": len(machines), "codec": codec, "num_params": num_params}
    async with contextlib.AsyncExitStack() as stack:
        children: list[Child] = []
        seeds: list[str] = []
        for rank, host in enumerate(machines):
            child, started = await stack.enter_async_context(
                Child.running(host, "averager", rank=rank, seeds=seeds, settings=settings, **config)
            )
            seeds = seeds or started["addresses"]
            children.append(child)
        yield Contender([(child, {}) for child in children], {})


@dataclass(frozen=True)
class OurPeer:
    """A child of ours, and its name."""

    child: Child
    peer_id: str


@contextlib.asynccontextmanager
async def our_peers(machines: list[Host], *, direct: bool) -> AsyncIterator[list[OurPeer]]:
    """Members of a new swarm that know one another."""
    admin = Identity.generate()
    genesis = Genesis(admin.verify_key, b"h" * 32)
    async with contextlib.AsyncExitStack() as stack:
        peers: list[OurPeer] = []
        seeds: list[str] = []
        known: list[str] = []
        for host in machines:
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


async def links(
    machines: list[Host], num_bytes: int, repeats: int, *, shaped: bool
) -> dict[str, float]:
    """Bytes per second and direction between two hosts, until the receiver's word, in turns:
    medians.

    Args:
        machines: two.
        num_bytes: of one transfer.
        repeats: counted ones.
        shaped: move the raw links both ways at once, too, as exchanges do; else by threads, too.
    """
    async with contextlib.AsyncExitStack() as stack:
        asks: dict[str, list[tuple[Child, dict[str, Any]]]] = {}
        raw = [await stack.enter_async_context(Child.running(host, "raw")) for host in machines]
        (one, at_one), (other, at_other) = raw
        for link in ("p2pd", "tcp"):
            there, back = ({"to": to, "link": link, "how": "streams"} for to in (at_other, at_one))
            asks[f"raw {link}, streams"] = [(one, there)]
            if shaped:
                asks[f"raw {link}, both ways"] = [(one, there), (other, back)]
            else:
                asks[f"raw {link}, threads"] = [(one, {**there, "how": "threads"})]
        for direct in (False, True):
            ours, partner = await stack.enter_async_context(our_peers(machines, direct=direct))
            command = {"command": "bulk", "to": partner.peer_id}
            asks[f"xpeer, {'direct' if direct else 'libp2p'}"] = [(ours.child, command)]
        seconds: dict[str, list[float]] = {name: [] for name in asks}
        for number in range(repeats + 2):
            for name, moves in asks.items():
                answers = await Child.ask_all(
                    [(c, {**m, "num_bytes": num_bytes}) for c, m in moves]
                )
                if number >= 2:
                    seconds[name].append(max(answer["seconds"] for answer in answers))
    return {name: num_bytes / statistics.median(times) for name, times in seconds.items()}
