"""Real peers on loopback, every one with its own sidecar; all are gone when the test ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from xpeer.identity import Identity
from xpeer.manifest.signed import Genesis
from xpeer.network.membership.certificates import Credential, Membership, Role
from xpeer.network.membership.invites import grant
from xpeer.network.swarm import Swarm

LOOPBACK = "/ip4/127.0.0.1/tcp/0"


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/swarm" in str(item.fspath):
            item.add_marker(pytest.mark.swarm)


@dataclass
class Founder:
    """An admin key and what its swarm's fingerprint commits to."""

    admin: Identity = field(default_factory=Identity.generate)

    @property
    def genesis(self) -> Genesis:
        return Genesis(self.admin.verify_key, b"h" * 32)

    @property
    def swarm_id(self) -> str:
        return self.genesis.swarm_id

    def credential(
        self, identity: Identity, role: Role = "member", ttl_s: float = 3600.0
    ) -> Credential:
        certificate = grant(self.genesis, identity.peer_id, role, ttl_s, time.time())
        return Credential.issue(self.admin, certificate, identity.peer_id)


Launch = Callable[..., Awaitable[Swarm]]


@pytest.fixture
def founder() -> Founder:
    return Founder()


@pytest.fixture
async def launch(founder: Founder, tmp_path: Path) -> AsyncIterator[Launch]:
    """Start a peer: launch(seeds=[...], role="member" | None, founder=...)."""
    running: list[Swarm] = []

    async def start(
        seeds: list[str] | None = None,
        role: Role | None = "member",
        of: Founder = founder,
        identity: Identity | None = None,
        listen: str = LOOPBACK,
        direct_listen: str = "",
    ) -> Swarm:
        identity = identity or Identity.generate()
        path = tmp_path / f"key-{identity.peer_id}-{len(running)}"
        identity.save(path)
        credential = of.credential(identity, role) if role else None
        swarm = await Swarm.start(
            identity,
            path,
            Membership(of.swarm_id, credential),
            listen=[listen],
            seeds=seeds or [],
            direct_listen=direct_listen,
        )
        running.append(swarm)
        return swarm

    yield start
    await asyncio.gather(*(swarm.close() for swarm in running))


@pytest.fixture
async def pair(launch: Launch) -> tuple[Swarm, Swarm]:
    """Two members that have reached one another."""
    first = await launch()
    second = await launch(seeds=first.addresses)
    await asyncio.wait_for(second.bootstrapping.reached.wait(), 20)
    first.learn(second.addresses)
    second.learn(first.addresses)
    return first, second
