"""This peer in the network: one sidecar, one DHT node, every handler gated. Starts hivemind.

The sidecar is restarted with the same identity when it dies, and the seeds are dialled late and
again: a seed that is down never stops a peer, and a swarm whose seed is gone goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from weakref import WeakValueDictionary

from hivemind.p2p import PeerID
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError, P2PHandlerError
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure, DispatchFailure
from hivemind.utils.multiaddr import Multiaddr

from xpeer.errors import LocalError, PeerError, Reason, known_reason
from xpeer.identity import Identity, PeerId
from xpeer.network import present, serving
from xpeer.network.addresses import (
    AddressBook,
    check_address,
    peer_of,
    resolve_listen,
    without_peer,
)
from xpeer.network.dht import OwnerSigned, start_node
from xpeer.network.link import Link, Meter
from xpeer.network.membership import Membership, Scope
from xpeer.network.p2p import CallHandler, GatedP2P
from xpeer.network.serving import LinkHandler, Served

log = logging.getLogger("xpeer.network")

CALL_TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 10.0
FIRST_RETRY_S, LONGEST_RETRY_S = 1.0, 60.0
HEALTHY_RETRY_S = 60.0
"""How often the seeds are dialled while all is well: two halves of a split DHT find together."""
INTRODUCED_S = 30.0
"""A restarted peer has forgotten us: before a new stream, introduce ourselves again after this."""
MAX_INTRODUCED = 4096
DIALLED_TOLD, DIALLED_HEARD = 12, 4
"""Members that are dialled beside the seeds: that spoke for themselves, or known by hearsay."""


class Swarm:
    """The network as the rest of the node sees it. Make with `start`, end with `close`.

    Attributes:
        peer_id: ours.
        membership: whom we let in.
        meter: bytes over links and calls.
        reached_seed: set while a seed or a member answers us.
        bootstrap_note: why no seed answers, for the operator.
        strangers_refused: calls and streams that the gate turned away.
        sidecar_restarts: since the start.
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
        self.reached_seed = asyncio.Event()
        self.bootstrap_note = ""
        self.strangers_refused = 0
        self.sidecar_restarts = 0
        self._identity = identity
        self._identity_path = identity_path
        self._listen = listen
        self._announce = announce
        self._seeds = {peer_of(seed): seed for seed in seeds}
        self._nat_port_map = nat_port_map
        self._served: list[Served] = []
        self._book = AddressBook(identity.peer_id)
        self._introduced: dict[PeerId, float] = {}
        self._introducing: WeakValueDictionary[PeerId, asyncio.Lock] = WeakValueDictionary()
        self._limit = present.RateLimit()
        self._redial = asyncio.Event()
        self._background: list[asyncio.Task[None]] = []
        self._dials: set[asyncio.Task[None]] = set()
        self._changing = asyncio.Lock()
        for seed in self._seeds:
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
    ) -> Swarm:
        """Listen and begin to look for the seeds.

        Args:
            identity: our key.
            identity_path: the file that the sidecar reads it from.
            membership: whom we let in, and our own credential.
            listen: TCP multiaddresses.
            announce: what to tell others, if it differs.
            seeds: addresses ending in /p2p/PEERID; none of them needs to be up.
            nat_port_map: ask the router for a port; multicasts.

        Raises:
            ConfigError: an address is malformed or its port is taken.
            LocalError: the sidecar does not start.
        """
        listen = resolve_listen(listen)
        for address in announce or []:
            check_address("network.announce", address)
        self = cls(
            identity,
            identity_path,
            membership,
            listen=listen,
            announce=announce or [],
            seeds=[seed for seed in seeds if peer_of(seed) != identity.peer_id],
            nat_port_map=nat_port_map,
        )
        await present.serve(self)
        await self._bring_up()
        self._background = [
            asyncio.create_task(self._keep_bootstrapping()),
            asyncio.create_task(self._keep_sidecar()),
        ]
        return self

    async def close(self) -> None:
        """Leave the network; nothing of ours is left running."""
        async with self._changing:  # a sidecar that is just being started would be orphaned
            for task in self._background:
                task.cancel()
            await asyncio.gather(*self._background, return_exceptions=True)
            await self._take_down()

    # Serving

    async def serve_links(self, protocol: str, handler: LinkHandler, scope: Scope) -> None:
        """Answer streams that partners open; an error ends the stream and nothing else."""
        await self._serve(Served(protocol, scope, link=handler))

    async def serve_call(
        self, protocol: str, handler: CallHandler, scope: Scope | None, max_request: int
    ) -> None:
        """Answer calls of at most `max_request` bytes; scope None is open to strangers."""
        await self._serve(Served(protocol, scope, call=handler, max_request=max_request))

    async def _serve(self, served: Served) -> None:
        self._served.append(served)
        if hasattr(self, "_p2p"):
            await self._register(served)

    async def _register(self, served: Served) -> None:
        await serving.register(self._p2p, served, self.meter)

    # Calling

    async def call(
        self, peer_id: PeerId, protocol: str, request: bytes, timeout_s: float = CALL_TIMEOUT_S
    ) -> bytes:
        """Ask a peer.

        Raises:
            PeerError: unreachable, silent, it refused, or our own sidecar is down.
        """
        with self._peer_errors(peer_id):
            async with asyncio.timeout(timeout_s):
                await self._reach(peer_id)
                await self.introduce(peer_id)
                ok, reply = await self._p2p.call(_hivemind_id(peer_id), protocol, request)
        self.meter.bytes_out += len(request)
        self.meter.bytes_in += len(reply)
        if not ok:
            reason = known_reason(reply[:32].decode(errors="replace"))
            if reason == Reason.NOT_A_MEMBER:
                self.rejected_by(peer_id)
            raise PeerError(reason, f"answer to {protocol}")
        return reply

    async def open_link(
        self, peer_id: PeerId, protocol: str, timeout_s: float = CONNECT_TIMEOUT_S
    ) -> Link:
        """Open a raw stream to a member, not yet sealed.

        Raises:
            PeerError: unreachable, or our own sidecar is down.
        """
        with self._peer_errors(peer_id):
            async with asyncio.timeout(timeout_s):
                await self._reach(peer_id)
                await self.introduce(peer_id)
                reader, writer = await self._p2p.open_stream(_hivemind_id(peer_id), protocol)
        return Link(peer_id, reader, writer, meter=self.meter)

    @contextlib.contextmanager
    def _peer_errors(self, peer_id: PeerId) -> Iterator[None]:
        try:
            yield
        except TimeoutError as e:
            raise PeerError(Reason.TIMEOUT, "no answer in time") from e
        except (P2PHandlerError, DispatchFailure) as e:
            raise PeerError(Reason.MALFORMED, type(e).__name__) from e
        except (P2PDaemonError, ControlFailure, OSError, asyncio.IncompleteReadError) as e:
            self._introduced.pop(peer_id, None)
            if self._p2p.died.is_set():
                raise PeerError(Reason.SIDECAR_DOWN, "our libp2p sidecar is gone") from e
            raise PeerError(Reason.UNREACHABLE, f"{str(e)[:120]!r}") from e

    async def _reach(self, peer_id: PeerId) -> None:
        """Tell the sidecar the addresses we know; a wrong one is no error yet."""
        if self._p2p.died.is_set():
            raise PeerError(Reason.SIDECAR_DOWN)
        addresses = self._addresses_of(peer_id)
        if addresses and peer_id not in self._introduced:
            with contextlib.suppress(ControlFailure, P2PDaemonError):
                await self._connect(peer_id, addresses)

    def _addresses_of(self, peer_id: PeerId) -> list[str]:
        seed = self._seeds.get(peer_id)
        return [*([seed] if seed else []), *self._book.of(peer_id)]

    async def _connect(self, peer_id: PeerId, addresses: list[str]) -> None:
        """Have the sidecar dial. hivemind leaks a socket when this is cancelled: so it is not."""
        maddrs = [Multiaddr(without_peer(address)) for address in addresses]
        dial = asyncio.ensure_future(self._p2p._client.connect(_hivemind_id(peer_id), maddrs))
        self._dials.add(dial)
        dial.add_done_callback(self._dialled)
        await asyncio.shield(dial)

    def _dialled(self, dial: asyncio.Task[None]) -> None:
        self._dials.discard(dial)
        if not dial.cancelled():
            dial.exception()  # whoever waited for it has heard; nobody else wants to

    # The gate (p2p.Gate)

    def admits(self, peer_id: PeerId, scope: Scope | None) -> bool:
        """Before a byte is read."""
        if scope is None:
            known = self.membership.certificate_of(peer_id) is not None
            return self._limit.allows(peer_id, known=known)
        if self.membership.allows(peer_id, scope):
            return True
        self.strangers_refused += 1
        return False

    async def introduce(self, peer_id: PeerId) -> None:
        """Present our credential, at most every INTRODUCED_S."""
        if self.membership.own is None or self._is_introduced(peer_id):
            return
        lock = self._introducing.setdefault(peer_id, asyncio.Lock())
        async with lock:
            if self._is_introduced(peer_id):
                return
            ok, reply = await self._p2p.call(
                _hivemind_id(peer_id), present.PROTOCOL, self.membership.own.to_bytes()
            )
            if not ok:
                raise PeerError(Reason.NOT_A_MEMBER, "our credential was refused")
            heard = present.take(self.membership, peer_id, reply)
            self._book.learn(heard, hearsay=True)
            self._introduced.pop(peer_id, None)
            self._introduced[peer_id] = time.monotonic()
            while len(self._introduced) > MAX_INTRODUCED:
                del self._introduced[next(iter(self._introduced))]

    def rejected_by(self, peer_id: PeerId) -> None:
        """Introduce ourselves again next time."""
        self._introduced.pop(peer_id, None)

    def _is_introduced(self, peer_id: PeerId) -> bool:
        since = self._introduced.get(peer_id)
        return since is not None and time.monotonic() - since < INTRODUCED_S

    # Addresses

    @property
    def addresses(self) -> list[str]:
        """Ours, each ending in /p2p/PEERID; loopback only if we listen on nothing else."""
        if self._announce:
            found = [without_peer(a) for a in self._announce]
        else:
            found = [str(a) for a in self._p2p._visible_maddrs]
            outside = [a for a in found if not a.startswith(("/ip4/127.", "/ip6/::1/"))]
            found = outside or found
        return [f"{address}/p2p/{self.peer_id}" for address in found]

    def learn(self, addresses: Iterable[str]) -> None:
        """Remember where members say that they can be reached; unusable ones are dropped."""
        self._book.learn(addresses, hearsay=False)

    def candidates(self) -> list[PeerId]:
        """Peers that might be members, seeds last."""
        return [*(peer for peer in self._book.peers() if peer not in self._seeds), *self._seeds]

    async def connected(self) -> list[str]:
        """Addresses of the members that are connected now."""
        peers = await self._p2p.list_peers()
        members = [p for p in peers if self.membership.allows(p.peer_id.to_base58(), "observer")]
        return [f"{a}/p2p/{p.peer_id.to_base58()}" for p in members for a in p.addrs[:2]]

    # Staying alive

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
        except (P2PDaemonError, OSError, asyncio.IncompleteReadError) as e:
            raise LocalError(
                f"the libp2p sidecar does not start: {e}",
                "check network.listen and the memory left",
            ) from e
        for served in self._served:
            await self._register(served)
        self.dht = await start_node(self._p2p, OwnerSigned(self.membership, self._identity))

    async def _take_down(self) -> None:
        self._introduced.clear()
        self.dht.is_alive = False  # ends its background work; its handlers go with the sidecar
        await self._p2p.shutdown()
        await asyncio.gather(*self._dials, return_exceptions=True)

    async def _keep_sidecar(self) -> None:
        delay_s = FIRST_RETRY_S
        while True:
            await self._p2p.died.wait()
            log.warning("the libp2p sidecar died; starting it again")
            self.reached_seed.clear()
            async with self._changing:
                restarted = await self._restart()
            if not restarted:
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, LONGEST_RETRY_S)
                continue
            delay_s = FIRST_RETRY_S
            self.sidecar_restarts += 1
            self._redial.set()

    async def _restart(self) -> bool:
        """A new sidecar and DHT node; False with everything down, to be tried again."""
        try:
            await self._take_down()
            await self._bring_up()
        except LocalError as e:
            log.error("%s", e)
        except Exception:  # e.g. the new one died while handlers were registered: the same again
            log.exception("the libp2p sidecar was not restarted")
        else:
            return True
        with contextlib.suppress(Exception):
            await self._p2p.shutdown()  # else a half-started one would pass for a living one
        return False

    async def _keep_bootstrapping(self) -> None:
        delay_s = FIRST_RETRY_S
        while True:
            self._redial.clear()
            try:
                reached = await self._bootstrap()
            except Exception:  # of a DHT node that is being replaced, or a bug: the loop goes on
                log.exception("dialling the seeds failed")
                reached = False
            if reached:
                self.reached_seed.set()
                delay_s = HEALTHY_RETRY_S
            else:
                self.reached_seed.clear()
                delay_s = min(2 * delay_s, LONGEST_RETRY_S) if delay_s < HEALTHY_RETRY_S else 1.0
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay_s):
                    await self._redial.wait()

    async def _bootstrap(self) -> bool:
        """Dial seeds and known members until some answer; whether one did."""
        targets = list(self._seeds)
        members = self._book.newest(DIALLED_TOLD, DIALLED_HEARD)
        targets += [peer for peer in members if peer not in self._seeds]
        if not targets:
            return True
        answers = await asyncio.gather(*(self._dial(peer) for peer in targets))
        failures = [note for note in answers if note]
        if len(failures) == len(targets):
            self.bootstrap_note = f"no seed answers: {failures[0]}"
            return False
        self.bootstrap_note = ""
        with contextlib.suppress(P2PDaemonError):
            await self.dht.find_nearest_nodes([self.dht.node_id])
        return True

    async def _dial(self, peer_id: PeerId) -> str:
        """Connect, introduce, ping; why not, or empty."""
        addresses = self._addresses_of(peer_id)
        try:
            with self._peer_errors(peer_id):
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    await self._connect(peer_id, addresses)
                    await self.introduce(peer_id)
                    pinged = await self.dht.protocol.call_ping(
                        _hivemind_id(peer_id), validate=True, strict=False
                    )
        except PeerError as e:
            return f"{addresses[0]}: {e}"
        return "" if pinged is not None else f"{addresses[0]}: no answer from its DHT"


def _hivemind_id(peer_id: PeerId) -> PeerID:
    return PeerID.from_base58(peer_id)
