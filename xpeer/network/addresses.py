"""Multiaddresses that people write: checked before anything is started."""

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
DIALLED_TOLD, DIALLED_HEARD = 12, 4
"""Members that are dialled beside the seeds: that spoke for themselves, or known by hearsay."""
_DIALLED = frozenset({"ip4", "ip6", "dns", "dns4", "dns6"})


def peer_of(address: str) -> PeerId:
    """The PeerID at the end of a multiaddress.

    Raises:
        ConfigError: malformed, or it does not end in /p2p/PEERID.
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
    """Check the addresses and their ports; port 0 becomes a free port that survives restarts.

    Args:
        listen: TCP multiaddresses.
        field: the setting they come from.

    Raises:
        ConfigError: malformed, not TCP, or the port is taken.
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
    """What others can dial of the addresses that we listen on; loopback only if that is all."""
    found = list(visible)
    return [a for a in found if not a.startswith(("/ip4/127.", "/ip6/::1/"))] or found


def is_dialled(address: str) -> bool:
    """Whether it is /ip4|ip6|dns*/HOST/tcp/PORT/p2p/PEERID: what others may have us dial."""
    parts = address.split("/")
    if len(parts) != 7 or parts[1] not in _DIALLED or (parts[3], parts[5]) != ("tcp", "p2p"):
        return False
    try:
        peer_of(address)
    except ConfigError:
        return False
    return True


class AddressBook:
    """Where members can be reached; bounded.

    What a peer said of itself and what others say of it are kept apart: hearsay never displaces a
    peer's own word, only other hearsay. A wrong address costs a failed dial and nothing else:
    libp2p authenticates the PeerID.

    Args:
        own: our PeerID, never noted.
        seeds: addresses that our operator gave; always the first to be dialled.

    Attributes:
        seeds: by PeerID; a seed may have several addresses.
    """

    def __init__(self, own: PeerId, seeds: Iterable[str] = ()) -> None:
        self._own = own
        self.seeds: dict[PeerId, list[str]] = {}
        for address in seeds:
            if (peer_id := peer_of(address)) != own:
                self.seeds.setdefault(peer_id, []).append(address)
        self._told: OrderedDict[PeerId, list[str]] = OrderedDict()
        self._heard: OrderedDict[PeerId, list[str]] = OrderedDict()

    def learn(self, addresses: Iterable[str], *, hearsay: bool) -> None:
        """Note addresses; unusable ones are dropped."""
        fresh: dict[PeerId, list[str]] = {}
        for address in addresses:
            if is_dialled(address):
                fresh.setdefault(peer_of(address), []).append(address)
        book = self._heard if hearsay else self._told
        for peer_id, known in fresh.items():
            if peer_id != self._own:
                book[peer_id] = known[:PER_PEER]
                book.move_to_end(peer_id)
        while len(book) > MAX_PEERS:
            book.popitem(last=False)

    def of(self, peer_id: PeerId) -> list[str]:
        """All addresses of a peer: our operator's, its own word, hearsay."""
        given = self.seeds.get(peer_id, ())
        known = [*given, *self._told.get(peer_id, ()), *self._heard.get(peer_id, ())]
        return list(dict.fromkeys(known))

    def peers(self) -> list[PeerId]:
        """Newest first; those that are known by hearsay alone last."""
        return list(dict.fromkeys([*reversed(self._told), *reversed(self._heard)]))

    def candidates(self) -> list[PeerId]:
        """Peers that might be members, seeds last."""
        return [*(peer for peer in self.peers() if peer not in self.seeds), *self.seeds]

    def targets(self) -> dict[PeerId, str]:
        """Whom to dial, and one address of each: the seeds, and some members."""
        members = self.newest(DIALLED_TOLD, DIALLED_HEARD)
        return {peer: self.of(peer)[0] for peer in [*self.seeds, *members]}

    def newest(self, told: int, heard: int) -> list[PeerId]:
        """Some of both kinds."""
        return list(
            dict.fromkeys(
                [
                    *itertools.islice(reversed(self._told), told),
                    *itertools.islice(reversed(self._heard), heard),
                ]
            )
        )
