"""How a node becomes part of a swarm: it finds members, and one of them admits it.

Each step tries until it succeeds; until then the node's note says what it waits for. `donors`
fetches the swarm's parameters afterwards.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from xpeer import founding
from xpeer.config import Home, NodeConfig
from xpeer.errors import ConfigError, PeerError
from xpeer.identity import Identity
from xpeer.manifest import Manifest
from xpeer.manifest.signed import SignedManifest
from xpeer.network import admission
from xpeer.network.membership.certificates import Membership
from xpeer.network.membership.keyring import KeyRing
from xpeer.network.swarm import Swarm
from xpeer.phase import Phase
from xpeer_daemon.life import Life
from xpeer_daemon.store import Store

log = logging.getLogger("xpeer.daemon")

RETRY_S = 2.0


@dataclass(frozen=True)
class Admitted:
    """What admission gives to a node: the manifest and the swarm key."""

    signed: SignedManifest
    manifest: Manifest
    keyring: KeyRing


async def connect(
    home: Home, config: NodeConfig, identity: Identity, membership: Membership, store: Store
) -> Swarm:
    """Start the network. Returns at once; the seeds are dialled meanwhile.

    Raises:
        ConfigError: no address of the swarm is known, or one is malformed.
    """
    network = config.network
    seeds = list(dict.fromkeys([*network.bootstrap, *founding.load_seeds(home)]))
    known = [a for peer in store.known_peers() for a in peer.addresses]
    if not seeds and not known and not founds(home):
        raise ConfigError(
            "network.bootstrap: no seed is known, and this home did not found the swarm",
            "give one: xpeer start --bootstrap /ip4/ADDRESS/tcp/PORT/p2p/PEERID",
        )
    swarm = await Swarm.start(
        identity,
        home.identity_key,
        membership,
        listen=network.listen,
        announce=network.announce,
        seeds=seeds,
        nat_port_map=network.nat_port_map,
        direct_listen=network.direct_listen,
    )
    swarm.learn(known)
    return swarm


def founds(home: Home) -> bool:
    """Whether this home founded the swarm: it may begin it, and has the initial model."""
    return home.initial_model.exists()


class Joiner:
    """Gets one home admitted.

    Args:
        home: locked by us.
        config: settings.
        identity: our key.
        swarm: the network.
        life: its phase and note say what is going on.
    """

    def __init__(
        self, home: Home, config: NodeConfig, identity: Identity, swarm: Swarm, life: Life
    ) -> None:
        self._home = home
        self._config = config
        self._identity = identity
        self._swarm = swarm
        self._life = life

    async def admission(self) -> Admitted:
        """Manifest and swarm key, from the home or else from any member.

        Raises:
            ConfigError: this node's settings demand more privacy than the manifest gives.
        """
        self._life.enter(Phase.JOINING)
        swarm_id = self._swarm.membership.swarm_id
        if not (self._home.manifest.exists() and self._home.swarm_key.exists()):
            self._life.note = "joining: no member has answered yet"
            given, swarm_key = await self._ask_members(swarm_id)
            manifest = given.open(swarm_id)
            try:
                self._accept(manifest)
            except ConfigError:
                founding.forget_join(self._home)  # this home may still join another swarm
                raise
            founding.keep_admission(self._home, given, swarm_key)
        self._life.note = ""
        signed = SignedManifest.load(self._home.manifest)
        manifest = signed.open(swarm_id)
        self._accept(manifest)
        if warning := manifest.privacy.policy.warning:
            log.warning("%s", warning)
        keyring = KeyRing(founding.load_swarm_key(self._home))
        return Admitted(signed, manifest, keyring)

    def _accept(self, manifest: Manifest) -> None:
        manifest.require_privacy(self._config.data.privacy, self._config.privacy.max_epsilon)

    async def _ask_members(self, swarm_id: str) -> tuple[SignedManifest, bytes]:
        while True:
            for member in self._swarm.candidates():
                try:
                    return await admission.request(self._swarm, self._identity, swarm_id, member)
                except PeerError as e:
                    log.debug("%s does not admit us: %s", member[-8:], e)
            note = self._swarm.bootstrap_note or "no member has answered yet"
            self._life.note = f"joining: {note}"
            await asyncio.sleep(RETRY_S)
