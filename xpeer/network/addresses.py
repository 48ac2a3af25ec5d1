"""Multiaddresses that people write: checked before anything is started."""

from __future__ import annotations

import socket

from hivemind.utils.multiaddr import Multiaddr

from xpeer.errors import ConfigError
from xpeer.identity import PeerId, public_key_of


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
            "copy the whole address that `xpeer bootstrap` or `xpeer status` prints",
        ) from e
    return PeerId(peer_id)


def resolve_listen(listen: list[str]) -> list[str]:
    """Check the addresses and their ports; port 0 becomes a free port that survives restarts.

    Raises:
        ConfigError: malformed, not TCP, or the port is taken.
    """
    resolved = []
    for address in listen:
        parts = check_address("network.listen", address).split("/")
        if len(parts) != 5 or parts[1] not in ("ip4", "ip6") or parts[3] != "tcp":
            raise ConfigError(
                f"network.listen: {address!r} is not /ip4/ADDRESS/tcp/PORT",
                "only TCP is supported, e.g. /ip4/0.0.0.0/tcp/4001",
            )
        family = socket.AF_INET if parts[1] == "ip4" else socket.AF_INET6
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((parts[2], int(parts[4])))
            except (OSError, OverflowError, ValueError) as e:
                raise ConfigError(
                    f"network.listen: can't listen on {address}: {e}",
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
