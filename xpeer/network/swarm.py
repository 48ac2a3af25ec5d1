"""This peer in the network: one sidecar, one DHT node, every handler gated. Starts hivemind.

A sidecar that dies is restarted with the same identity. Seeds are dialled again and again in the
background, so a seed that is down stops neither a node nor the swarm.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from weakref import WeakValueDictionary

from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError, P2PHandlerError
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure, DispatchFailure
from hivemind.utils.multiaddr import Multiaddr

from xpeer.errors import LocalError, PeerError, Reason, known_reason
from xpeer.identity import Identity, PeerId
from xpeer.network import introductions, serving
from xpeer.network.addresses import (
    AddressBook,
    host_of,
    reachable,
    resolve_listen,
    without_peer,
)
from xpeer.network.dht import OwnerSigned, ping, start_node
from xpeer.network.direct import Direct
from xpeer.network.link import Link, Meter
from xpeer.network.membership.certificates import Membership, Scope
from xpeer.network.multiaddress import check_announce
from xpeer.network.p2p import CallHandler, GatedP2P
from xpeer.network.seeds import FIRST_RETRY_S, LONGEST_RETRY_S, Answer, Bootstrapping
from xpeer.network.serving import LinkHandler, Served
from xpeer.network.stream import Stream

log = logging.getLogger("xpeer.network")

CALL_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 10.0


class Swarm:
    """The network as the rest of the node sees it. Make it with `start`, end it with `close`.

    Attributes:
        peer_id: our PeerID.
        membership: says whom we let in.
        meter: counts bytes over links and calls.
        direct: opens direct streams.
        strangers_refused: calls and streams of strangers that the gate refused so far.
        sidecar_restarts: how often the sidecar was restarted since `start`.
        dht: the DHT node in this process; another one after each restart of the sidecar.
    """

    def __init__(
        self,
        identity: Identity,
        identity_path: Path,
        membership: Membership,
        *,
        listen: list[str],
        announce: list[str],
        seeds: list[str],
        nat_port_map: bool,
    ) -> None:
        self.peer_id = identity.peer_id
        self.membership = membership
        self.meter = Meter()
        self.direct = Direct(self._hosts_of)
        self.strangers_refused = self.sidecar_restarts = 0
        self._identity, self._identity_path = identity, identity_path
        self._listen, self._announce, self._nat_port_map = listen, announce, nat_port_map
        self._served: list[Served] = []
        self._addresses = AddressBook(identity.peer_id, seeds)
        self._bootstrapping = Bootstrapping(
            self._addresses.targets, self._dial, self._find_neighbours, self._addresses.seeds
        )
        self._introduced = introductions.Introduced()
        self._introducing: WeakValueDictionary[PeerId, asyncio.Lock] = WeakValueDictionary()
        self._limit = introductions.RateLimit()
        self._background: list[asyncio.Task[None]] = []
        self._changing = asyncio.Lock()
        for seed in self._addresses.seeds:
            membership.trust_seed(seed)

    @classmethod
    async def start(
        cls,
        identity: Identity,
        identity_path: Path,
        membership: Membership,
        *,
        listen: list[str],
        announce: list[str] | None = None,
        seeds: Iterable[str] = (),
        nat_port_map: bool = False,
        direct_listen: str = "",
    ) -> Swarm:
        """Listen and begin to look for the seeds.

        Args:
            identity: our key.
            identity_path: the file that the sidecar reads it from.
            membership: says whom we let in, and has our own credential.
            listen: TCP multiaddresses.
            announce: addresses that others get, if they differ from `listen`.
            seeds: addresses ending in /p2p/PEERID; none of them needs to be up.
            nat_port_map: ask the router for a port, by multicast.
            direct_listen: multiaddress for direct streams; empty = none.

        Raises:
            ConfigError: an address is malformed, or its port is in use.
            LocalError: the sidecar does not start.
        """
        listen = resolve_listen(listen)
        for address in announce or []:
            check_announce("network.announce", address)
        self = cls(
            identity,
            identity_path,
            membership,
            listen=listen,
            announce=announce or [],
            seeds=list(seeds),
            nat_port_map=nat_port_map,
        )
        if direct_listen:
            await self.direct.listen(direct_listen)
        await introductions.serve(self)
        try:
            await self._bring_up()
        except BaseException:
            await self.direct.close()
            raise
        self._background = [
            asyncio.create_task(self._bootstrapping.run()),
            asyncio.create_task(self._keep_sidecar()),
        ]
        return self

    async def close(self) -> None:
        """Leave the network, and end everything that `start` began."""
        async with self._changing:  # wait for a restart: its sidecar would be orphaned
            for task in self._background:
                task.cancel()
            await asyncio.gather(*self._background, return_exceptions=True)
            await self._take_down()
        await self.direct.close()

    # Serving

    async def serve_links(self, protocol: str, handler: LinkHandler, scope: Scope) -> None:
        """Answer streams that partners open. An error in the handler ends only its stream."""
        await self._serve(Served(protocol, scope, link=handler))

    async def serve_call(
        self, protocol: str, handler: CallHandler, scope: Scope | None, max_request: int
    ) -> None:
        """Answer calls of at most `max_request` bytes. Scope None lets strangers call."""
        await self._serve(Served(protocol, scope, call=handler, max_request=max_request))

    async def _serve(self, served: Served) -> None:
        self._served.append(served)
        if hasattr(self, "_p2p"):
            await self._register(served)

    async def _register(self, served: Served) -> None:
        await serving.register(self._p2p, served, self.meter, self.direct)

    # Calling

    async def call(
        self, peer_id: PeerId, protocol: str, request: bytes, timeout_s: float = CALL_TIMEOUT_S
    ) -> bytes:
        """Call a peer's handler, and return the reply.

        Raises:
            PeerError: the peer is unreachable, silent or refuses, or our own sidecar is down.
        """
        with self._peer_errors(peer_id):
            async with asyncio.timeout(timeout_s):
                just_now = await self.introduce(peer_id)
                reply, reason = await self._ask(peer_id, protocol, request)
                if reason == Reason.NOT_A_MEMBER and not just_now:  # it restarted and forgot us
                    self.rejected_by(peer_id)
                    await self.introduce(peer_id)
                    reply, reason = await self._ask(peer_id, protocol, request)
        if reason:
            raise PeerError(reason, f"answer to {protocol}")
        return reply

    async def _ask(self, peer_id: PeerId, protocol: str, request: bytes) -> tuple[bytes, str]:
        """(The reply, ""), or (anything, the reason code) if the peer refused."""
        ok, reply = await self._p2p.call(_hivemind_id(peer_id), protocol, request)
        self.meter.bytes_out += len(request)
        self.meter.bytes_in += len(reply)
        return reply, "" if ok else known_reason(reply[:32].decode(errors="replace"))

    async def open_link(
        self, peer_id: PeerId, protocol: str, timeout_s: float = CONNECT_TIMEOUT_S
    ) -> Link:
        """Open a link to a member. It is not sealed before `Link.connect`.

        Raises:
            PeerError: the member is unreachable, or our own sidecar is down.
        """
        with self._peer_errors(peer_id):
            async with asyncio.timeout(timeout_s):
                await self.introduce(peer_id)
                reader, writer = await self._p2p.open_stream(_hivemind_id(peer_id), protocol)
                stream = await Stream.adopt(reader, writer)
        return Link(peer_id, stream, meter=self.meter, direct=self.direct)

    @contextlib.contextmanager
    def _peer_errors(self, peer_id: PeerId) -> Iterator[None]:
        try:
            yield
        except TimeoutError as e:
            raise PeerError(Reason.TIMEOUT, "no answer in time") from e
        except (P2PHandlerError, DispatchFailure) as e:
            stranger = Reason.NOT_A_MEMBER in str(e)
            reason = Reason.NOT_A_MEMBER if stranger else Reason.MALFORMED
            raise PeerError(reason, type(e).__name__) from e
        except (P2PDaemonError, ControlFailure, OSError, asyncio.IncompleteReadError) as e:
            self._introduced.forget(peer_id)
            if self._p2p.died.is_set():
                raise PeerError(Reason.SIDECAR_DOWN, "our libp2p sidecar is gone") from e
            raise PeerError(Reason.UNREACHABLE, f"{str(e)[:120]!r}") from e

    async def _reach(self, peer_id: PeerId) -> None:
        """Make the sidecar connect at the addresses we know. A failure shows at the next call."""
        if addresses := self._addresses.of(peer_id):
            with contextlib.suppress(ControlFailure, P2PDaemonError):
                await self._connect(peer_id, addresses)

    async def _connect(self, peer_id: PeerId, addresses: list[str]) -> None:
        maddrs = [Multiaddr(without_peer(address)) for address in addresses]
        await self._p2p.dial(_hivemind_id(peer_id), maddrs)

    def sign(self, domain: bytes, message: bytes) -> bytes:
        """Our signature, good only for this domain."""
        return self._identity.sign(domain, message)

    # The gate (p2p.Gate)

    def admits(self, peer_id: PeerId, scope: Scope | None) -> bool:
        """Whether the gate lets this peer call a handler of this scope; see `p2p.Gate.admits`."""
        if scope is None:
            known = self.membership.certificate_of(peer_id) is not None
            allowed = self._limit.allows(peer_id, known=known)
        else:
            known, allowed = False, self.membership.allows(peer_id, scope)
        self.strangers_refused += not (known or allowed)
        return allowed

    async def introduce(self, peer_id: PeerId) -> bool:
        """Connect and present our credential, unless we did so within KNOWN_S.

        Returns:
            False: this peer knew us already. See `p2p.Gate.introduce`.

        Raises:
            PeerError: the peer refused our credential, now or a moment ago, or our own sidecar is
                down.
        """
        if self._p2p.died.is_set():
            raise PeerError(Reason.SIDECAR_DOWN)
        if self.membership.own is None:
            return True
        lock = self._introducing.setdefault(peer_id, asyncio.Lock())
        async with lock:
            if peer_id in self._introduced:
                return False
            if self._introduced.is_left_alone(peer_id):
                raise PeerError(Reason.NOT_A_MEMBER, "it refused our credential a moment ago")
            await self._reach(peer_id)
            ok, reply = await self._p2p.call(
                _hivemind_id(peer_id), introductions.PROTOCOL, self.membership.own.to_bytes()
            )
            try:
                heard = introductions.take(self.membership, peer_id, reply if ok else b"")
            except PeerError:
                self._introduced.refused(peer_id)
                raise
            self._addresses.learn(heard, hearsay=True)
            self._introduced.accepted(peer_id)
            return True

    def rejected_by(self, peer_id: PeerId) -> None:
        """Note that this peer does not know us: the next call introduces us again."""
        self._introduced.forget(peer_id)

    # Addresses

    @property
    def addresses(self) -> list[str]:
        """Our addresses, each ending in /p2p/PEERID; loopback only if we listen on nothing else."""
        announced = [without_peer(address) for address in self._announce]
        ours = announced or reachable(str(address) for address in self._p2p._visible_maddrs)
        return [f"{address}/p2p/{self.peer_id}" for address in ours]

    def learn(self, addresses: Iterable[str]) -> None:
        """Note addresses that members announced for themselves; unusable ones are dropped."""
        self._addresses.learn(addresses, hearsay=False)

    def candidates(self) -> list[PeerId]:
        """Peers that might be members; seeds come last."""
        return self._addresses.candidates()

    async def connected(self) -> list[str]:
        """Addresses of the members that are connected now."""
        peers = await self._p2p.list_peers()
        members = [p for p in peers if self.membership.allows(p.peer_id.to_base58(), "observer")]
        return [f"{a}/p2p/{p.peer_id.to_base58()}" for p in members for a in p.addrs[:2]]

    async def _hosts_of(self, peer_id: PeerId) -> list[str]:
        """IP addresses at which the sidecar is connected to this peer."""
        with self._peer_errors(peer_id):
            peers = await self._p2p.list_peers()
        ours = [p for p in peers if p.peer_id.to_base58() == peer_id]
        return list(dict.fromkeys(host for p in ours for a in p.addrs if (host := host_of(str(a)))))

    # Staying alive

    @property
    def bootstrap_note(self) -> str:
        """Why no seed answers, or that our clock is wrong, for the operator. Empty: all is well."""
        return self._bootstrapping.note

    @property
    def bootstrapping(self) -> Bootstrapping:
        """The loop that dials: it knows which seeds answer, and how far our clock is off."""
        return self._bootstrapping

    @property
    def sidecar_alive(self) -> bool:
        """Whether the libp2p process runs."""
        return not self._p2p.died.is_set()

    @property
    def neighbours(self) -> int:
        """DHT nodes in our routing table."""
        return len(self.dht.protocol.routing_table.uid_to_peer_id)

    async def _bring_up(self) -> None:
        try:
            self._p2p = await GatedP2P.launch(
                gate=self,
                identity_path=self._identity_path,
                listen=self._listen,
                announce=self._announce,
                nat_port_map=self._nat_port_map,
            )
            try:
                for served in self._served:
                    await self._register(served)
                self.dht = await start_node(self._p2p, OwnerSigned(self.membership, self._identity))
            except BaseException:
                await self._p2p.shutdown()  # never leave a half-started sidecar
                raise
        except (P2PDaemonError, OSError, asyncio.IncompleteReadError) as e:
            raise LocalError(
                f"the libp2p sidecar does not start: {e}",
                "check network.listen and the memory left",
            ) from e

    async def _take_down(self) -> None:
        self._introduced.clear()
        self.dht.is_alive = False  # ends its background work; its handlers go with the sidecar
        await self._p2p.shutdown()

    async def _keep_sidecar(self) -> None:
        delay_s = FIRST_RETRY_S
        while True:
            await self._p2p.died.wait()
            log.warning("the libp2p sidecar died; starting it again")
            self._bootstrapping.lost()
            async with self._changing:
                restarted = await self._restart()
            if not restarted:
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, LONGEST_RETRY_S)
                continue
            delay_s = FIRST_RETRY_S
            self.sidecar_restarts += 1
            self._bootstrapping.again()

    async def _restart(self) -> bool:
        """Start a new sidecar and DHT node. False: nothing runs, and it has to be tried again."""
        try:
            await self._take_down()
            await self._bring_up()
        except LocalError as e:
            log.error("%s", e)
        except Exception:  # e.g. the new sidecar died while handlers were registered
            log.exception("the libp2p sidecar was not restarted")
        else:
            return True
        return False

    async def _dial(self, peer_id: PeerId) -> Answer:
        """Connect, introduce ourselves and ping."""
        with self._peer_errors(peer_id):
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._connect(peer_id, self._addresses.of(peer_id))
                await self.introduce(peer_id)
                return await ping(self.dht, _hivemind_id(peer_id))

    async def _find_neighbours(self) -> None:
        with contextlib.suppress(P2PDaemonError):
            await self.dht.find_nearest_nodes([self.dht.node_id])


def _hivemind_id(peer_id: PeerId) -> PeerID:
    return PeerID.from_base58(peer_id)
