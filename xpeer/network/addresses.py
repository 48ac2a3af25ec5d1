"""Multiaddresses: checks of those that people write, and a book of those that peers announce."""

from __future__ import annotations

import itertools
import socket
from collections import OrderedDict
from collections.abc import Iterable

from hivemind.utils.multiaddr import Multiaddr

from xpeer.errors import ConfigError
from xpeer.identity import PeerId, public_key_of
from xpeer.network.multiaddress import check_listen

MAX_PEERS = 4096
PER_PEER = 8
DIALLED_ANNOUNCED, DIALLED_HEARD = 12, 4
"""How many members are dialled beside the seeds: those that announced their own addresses, and
those that others named."""
_DIALLED = frozenset({"ip4", "ip6", "dns", "dns4", "dns6"})


def peer_of(address: str) -> PeerId:
    """The PeerID at the end of a multiaddress.

    Raises:
        ConfigError: it is malformed, or does not end in /p2p/PEERID.
    """
    check_address("network.bootstrap", address)
    _, mark, peer_id = address.rpartition("/p2p/")
    try:
        public_key_of(peer_id if mark else "")
    except ValueError as e:
        raise ConfigError(
            f"network.bootstrap: {address!r} does not end in /p2p/PEERID",
            "copy the whole address that `xpeer bootstrap` or `xpeer status --wide` prints",
        ) from e
    return PeerId(peer_id)


def resolve_listen(listen: list[str], field: str = "network.listen") -> list[str]:
    """Check the addresses and their ports.

    A port 0 is replaced by a free port, so that a restarted sidecar listens on the same one.

    Args:
        listen: TCP multiaddresses.
        field: the setting that names them, for messages.

    Raises:
        ConfigError: an address is malformed or not TCP, or its port is in use.
    """
    resolved = []
    for address in listen:
        parts = check_listen(field, address).split("/")
        family = socket.AF_INET if parts[1] == "ip4" else socket.AF_INET6
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((parts[2], int(parts[4])))
            except (OSError, OverflowError, ValueError) as e:
                raise ConfigError(
                    f"{field}: can't listen on {address}: {e}",
                    "choose another port or stop the program that uses it",
                ) from e
            port = probe.getsockname()[1]
        resolved.append("/".join([*parts[:4], str(port)]))
    return resolved


def check_address(field: str, address: str) -> str:
    """The address in its usual spelling.

    Raises:
        ConfigError: it is not a multiaddress.
    """
    try:
        return str(Multiaddr(address))
    except Exception as e:
        raise ConfigError(
            f"{field}: {address!r} is not a multiaddress: {e}",
            "write it as /ip4/ADDRESS/tcp/PORT/p2p/PEERID or /dns4/NAME/tcp/PORT/p2p/PEERID",
        ) from e


def without_peer(address: str) -> str:
    """The address without its /p2p/PEERID."""
    return address.rpartition("/p2p/")[0] or address


def host_of(address: str) -> str:
    """The IP address at the front of a multiaddress; empty if there is none."""
    parts = address.split("/")
    return parts[2] if len(parts) > 2 and parts[1] in ("ip4", "ip6") else ""


def reachable(visible: Iterable[str]) -> list[str]:
    """Leave out loopback addresses, unless there are no others."""
    addresses = list(visible)
    return [a for a in addresses if not a.startswith(("/ip4/127.", "/ip6/::1/"))] or addresses


def is_dialled(address: str) -> bool:
    """Whether it is /ip4|ip6|dns*/HOST/tcp/PORT/p2p/PEERID. We dial no other form for others."""
    parts = address.split("/")
    if len(parts) != 7 or parts[1] not in _DIALLED or (parts[3], parts[5]) != ("tcp", "p2p"):
        return False
    try:
        peer_of(address)
    except ConfigError:
        return False
    return True


class AddressBook:
    """Where members can be reached: at most MAX_PEERS peers of each kind.

    Addresses that a peer announced and addresses that others named (hearsay) are kept apart.
    Hearsay can only displace other hearsay. A wrong address costs a failed dial and nothing else,
    since libp2p authenticates the PeerID.

    Args:
        own: our PeerID. It is never noted.
        seeds: addresses that our operator gave. They are dialled first.

    Attributes:
        seeds: addresses of each seed. Never changes.
    """

    def __init__(self, own: PeerId, seeds: Iterable[str] = ()) -> None:
        self._own = own
        self.seeds: dict[PeerId, list[str]] = {}
        for address in seeds:
            if (peer_id := peer_of(address)) != own:
                self.seeds.setdefault(peer_id, []).append(address)
        self._announced: OrderedDict[PeerId, list[str]] = OrderedDict()
        self._heard: OrderedDict[PeerId, list[str]] = OrderedDict()

    def learn(self, addresses: Iterable[str], *, hearsay: bool) -> None:
        """Note addresses, and drop unusable ones.

        Args:
            addresses: each ends in /p2p/PEERID.
            hearsay: True iff they come from another peer than the one that they name.
        """
        fresh: dict[PeerId, list[str]] = {}
        for address in addresses:
            if is_dialled(address):
                fresh.setdefault(peer_of(address), []).append(address)
        kind = self._heard if hearsay else self._announced
        for peer_id, known in fresh.items():
            if peer_id != self._own:
                kind[peer_id] = known[:PER_PEER]
                kind.move_to_end(peer_id)
        while len(kind) > MAX_PEERS:
            kind.popitem(last=False)

    def of(self, peer_id: PeerId) -> list[str]:
        """All addresses of a peer: first our operator's, then its own, then hearsay."""
        given = self.seeds.get(peer_id, ())
        known = [*given, *self._announced.get(peer_id, ()), *self._heard.get(peer_id, ())]
        return list(dict.fromkeys(known))

    def peers(self) -> list[PeerId]:
        """Peers with known addresses, the newest first. Peers of hearsay alone come last."""
        return list(dict.fromkeys([*reversed(self._announced), *reversed(self._heard)]))

    def candidates(self) -> list[PeerId]:
        """Peers that might be members; seeds come last."""
        return [*(peer for peer in self.peers() if peer not in self.seeds), *self.seeds]

    def targets(self) -> dict[PeerId, str]:
        """One address of each peer to dial: of all seeds and some members."""
        members = self.newest(DIALLED_ANNOUNCED, DIALLED_HEARD)
        return {peer: self.of(peer)[0] for peer in [*self.seeds, *members]}

    def newest(self, announced: int, heard: int) -> list[PeerId]:
        """The newest peers: so many that announced their addresses, and so many of hearsay."""
        return list(
            dict.fromkeys(
                [
                    *itertools.islice(reversed(self._announced), announced),
                    *itertools.islice(reversed(self._heard), heard),
                ]
            )
        )
