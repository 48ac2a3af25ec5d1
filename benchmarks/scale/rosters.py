"""Rosters of many members in one process: the real `Roster` on a simulated clock and network.

The network delivers every call at once and costs nothing; what it stands for (libp2p, TCP) is
measured by the rig of real peers. Bytes are those of sealed questions and answers, and of values
stored in the DHT and read from it.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

from xpeer.errors import PeerError, Reason
from xpeer.identity import Identity, PeerId
from xpeer.manifest.signed import Genesis
from xpeer.network.addresses import peer_of
from xpeer.network.membership.certificates import Credential, Membership, Role
from xpeer.network.membership.invites import grant
from xpeer.network.membership.keyring import KeyRing
from xpeer.roster.roster import ANNOUNCE_EVERY_S, MemberRecord, Roster

REFRESH_EVERY_S = 3.0
START_S = 1_800_000_000.0
_Handler = Callable[[PeerId, bytes], Awaitable[bytes]]


class Net:
    """All nodes, one clock, one DHT that never loses anything before it expires.

    Args:
        seed: of the order in which nodes act.
        max_members: of the swarm.
    """

    def __init__(self, seed: int = 0, max_members: int = 256) -> None:
        self.now_s = START_S
        self.admin = Identity.generate()
        self.genesis = Genesis(self.admin.verify_key, b"h" * 32)
        self.max_members = max_members
        self.nodes: dict[PeerId, Node] = {}
        self.stored: dict[str, dict[str, tuple[bytes, float]]] = {}
        self.cut: Callable[[PeerId, PeerId], bool] = lambda one, other: False
        self.random = random.Random(seed)

    def join(self, knows: Iterable[Node] = (), **record: Any) -> Node:
        """A new node that has the addresses of some others."""
        node = Node(self, **record)
        node.learn(a for other in knows for a in other.record.addresses)
        self.nodes[node.peer_id] = node
        return node

    async def run(
        self, seconds: float, each_s: Callable[[], None] = lambda: None, step_s: float = 0.5
    ) -> None:
        """Let time pass; nodes act when they are due, in random order."""
        for _ in range(round(seconds / step_s)):
            self.now_s += step_s
            due = [node for node in self.nodes.values() if node.is_due()]
            self.random.shuffle(due)
            for node in due:
                await node.act()
            each_s()

    def agree(self) -> bool:
        """Whether all nodes list the same members, in the same phases."""
        views = {
            frozenset((peer, record.phase) for peer, record in node.roster.members().items())
            for node in self.nodes.values()
        }
        return len(views) <= 1


@dataclass
class Traffic:
    """Of one node."""

    calls: int = 0
    """Questions asked."""
    bytes_out: int = 0
    bytes_in: int = 0
    stores: int = 0
    reads: int = 0
    """Keys read from the DHT."""


class Node:
    """A member: stands for `Swarm` and its DHT node towards its own real roster."""

    def __init__(self, net: Net, role: Role = "member", **record: Any) -> None:
        self.net = net
        identity = Identity.generate()
        self.peer_id = identity.peer_id
        self.sign = identity.sign
        certificate = grant(net.genesis, self.peer_id, role, 86_400, net.now_s)
        credential = Credential.issue(net.admin, certificate, self.peer_id)
        self.membership = Membership(net.genesis.swarm_id, credential, lambda: net.now_s)
        self.membership.admit(self.peer_id, credential.to_bytes())
        self.dht = SimpleNamespace(store=self._store, get_many=self._get_many)
        self.traffic = Traffic()
        self.handlers: dict[str, _Handler] = {}
        self.book: OrderedDict[PeerId, str] = OrderedDict()
        address = f"/ip4/192.0.2.1/tcp/4001/p2p/{self.peer_id}"
        plain: dict[str, Any] = {
            "addresses": [address], "role": role, "phase": "training", "speed": 1.0, "slot": 7,
        }  # fmt: skip
        self.record = MemberRecord(self.peer_id, **(plain | record))
        self.keyring = KeyRing(b"k" * 32)
        self.roster = Roster(cast(Any, self), self.keyring, net.max_members, lambda: net.now_s)
        self._refresh_s = net.now_s + net.random.uniform(0, REFRESH_EVERY_S)
        self._announce_s = net.now_s

    def is_due(self) -> bool:
        """Whether it announces or refreshes now."""
        return self.net.now_s >= min(self._refresh_s, self._announce_s)

    async def act(self) -> None:
        """What the daemon does every few seconds."""
        if not self.handlers:
            await self.roster.serve()
        if self.net.now_s >= self._announce_s:
            self._announce_s = self.net.now_s + ANNOUNCE_EVERY_S
            await self.roster.announce(self.record)
        if self.net.now_s >= self._refresh_s:
            self._refresh_s = self.net.now_s + REFRESH_EVERY_S
            await self.roster.refresh()

    # As network.swarm.Swarm

    async def serve_call(
        self, protocol: str, handler: _Handler, scope: str, max_request: int
    ) -> None:
        """Answer calls."""
        self.handlers[protocol] = handler

    async def call(self, peer_id: PeerId, protocol: str, request: bytes, timeout_s: float) -> bytes:
        """Ask another node."""
        other = self.net.nodes.get(peer_id)
        if other is None or protocol not in other.handlers or self.net.cut(self.peer_id, peer_id):
            raise PeerError(Reason.UNREACHABLE)
        reply = await other.handlers[protocol](self.peer_id, request)
        self.traffic.calls += 1
        for node, sent, received in ((self, request, reply), (other, reply, request)):
            node.traffic.bytes_out += len(sent)
            node.traffic.bytes_in += len(received)
        return reply

    def learn(self, addresses: Iterable[str]) -> None:
        """Remember where others are."""
        for address in addresses:
            if (peer_id := peer_of(address)) != self.peer_id:
                self.book[peer_id] = address

    def candidates(self) -> list[PeerId]:
        """Whom we have heard of."""
        return list(reversed(self.book))

    async def _store(self, key: str, value: bytes, expiration: float, subkey: str) -> bool:
        self.traffic.stores += 1
        self.net.stored.setdefault(key, {})[subkey] = value, expiration
        return True

    async def _get_many(self, keys: list[str], sufficient_expiration_time: float) -> dict[str, Any]:
        self.traffic.reads += len(keys)
        found: dict[str, Any] = {}
        for key in keys:
            live = {
                owner: SimpleNamespace(value=value)
                for owner, (value, until) in self.net.stored.get(key, {}).items()
                if until > self.net.now_s and not self.net.cut(self.peer_id, PeerId(owner))
            }
            for owner in live:  # a stored value brings its owner's credential with it
                if (other := self.net.nodes.get(PeerId(owner))) is not None:
                    own = other.membership.own
                    if own is not None:
                        self.membership.admit(owner, own.to_bytes())
            found[key] = SimpleNamespace(value=live) if live else None
        return found


@dataclass
class Measured:
    """A swarm of N members, a minute at a time."""

    peers: int
    bytes_per_peer_minute: float
    """Of questions and answers, sent and received, sealed."""
    calls_per_peer_minute: float
    """Asked; as many are answered."""
    stores_per_peer_minute: float
    reads_per_peer_minute: float
    lifetime_s: float
    steady_disagreed_s: float
    """While nobody came, went or changed: how long, of all the time, any two rosters differed."""
    joined_s: float
    """From a newcomer's first question until all rosters list it."""
    changed_s: float
    """From a changed card until all rosters show it."""
    silent_s: float
    """From a member's death until the last roster drops it."""
    disagreed_s: float
    """Between the first and the last roster to drop it."""
    healed_s: float
    """From the end of a split into halves, after all had dropped one another."""


async def measure(peers: int, seed: int = 0, minutes: float = 2.0) -> Measured:
    """Let a swarm of N members meet, and then join, change, die and split."""
    net = Net(seed, max_members=max(256, peers + 1))
    first = net.join()
    for _ in range(peers - 1):
        net.join([first])
    await net.run(120.0)
    before = {id(node): Traffic(**vars(node.traffic)) for node in net.nodes.values()}
    agreed: list[bool] = []
    await net.run(60.0 * minutes, lambda: agreed.append(net.agree()))
    nodes = list(net.nodes.values())

    def rate(name: str) -> float:
        grown = sum(getattr(n.traffic, name) - getattr(before[id(n)], name) for n in nodes)
        return float(grown) / len(nodes) / minutes

    lifetime_s = first.roster._own._lifetime_s
    steady = {name: rate(name) for name in ("bytes_out", "bytes_in", "calls", "stores", "reads")}
    newcomer = net.join([first])
    joined_s = await _until(net, lambda: net.agree() and len(newcomer.roster.members()) > peers)
    newcomer.record = MemberRecord(
        newcomer.peer_id, newcomer.record.addresses, "member", "closing", 1.0, 9
    )
    newcomer._announce_s = net.now_s
    changed_s = await _until(
        net,
        lambda: all(
            n.roster.members()[newcomer.peer_id].phase == "closing" for n in net.nodes.values()
        ),
    )
    del net.nodes[newcomer.peer_id]
    listing: list[int] = []

    def gone() -> bool:
        listing.append(sum(newcomer.peer_id in n.roster.members() for n in net.nodes.values()))
        return listing[-1] == 0

    silent_s = await _until(net, gone)
    disagreed_s = 0.5 * sum(0 < count < peers for count in listing)
    halves = {peer: i % 2 for i, peer in enumerate(net.nodes)}
    net.cut = lambda one, other: halves.get(one) != halves.get(other)
    await net.run(lifetime_s + 30.0)
    net.cut = lambda one, other: False
    healed_s = await _until(net, net.agree)
    return Measured(
        peers=peers,
        bytes_per_peer_minute=steady["bytes_out"] + steady["bytes_in"],
        calls_per_peer_minute=steady["calls"],
        stores_per_peer_minute=steady["stores"],
        reads_per_peer_minute=steady["reads"],
        lifetime_s=lifetime_s,
        steady_disagreed_s=0.5 * agreed.count(False),
        joined_s=joined_s,
        changed_s=changed_s,
        silent_s=silent_s,
        disagreed_s=disagreed_s,
        healed_s=healed_s,
    )


async def _until(net: Net, holds: Callable[[], bool], longest_s: float = 900.0) -> float:
    """Simulated seconds until it holds; infinity if it does not."""
    began = net.now_s
    while not holds():
        if net.now_s - began > longest_s:
            return float("inf")
        await net.run(0.5)
    return net.now_s - began
