"""Checks of multiaddresses that people write; they need no libp2p. See also `addresses`.

Only TCP is supported: /ip4/ADDRESS/tcp/PORT, /ip6/..., /dns4/NAME/tcp/PORT and their like, followed
by /p2p/PEERID if the address names a peer.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from typing import Final

from xpeer.errors import ConfigError
from xpeer.identity import public_key_of

_NAMES: Final = frozenset({"dns", "dns4", "dns6"})
_LABEL: Final = "[A-Za-z0-9_][A-Za-z0-9_-]{0,62}"
_HOST_NAME: Final = re.compile(rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*\.?")
MAX_ADDRESSES: Final = 8
"""A member announces this many addresses, the first ones."""
MAX_CHARS: Final = 240
"""Longest address that a member announces, without /p2p/PEERID. Others refuse cards with longer
ones, ..."""
MAX_TOTAL_CHARS: Final = 1280
"""... and cards that are too long with all their addresses."""
_FORM: Final = "write it as /ip4/ADDRESS/tcp/PORT or /dns4/NAME/tcp/PORT"


def check_listen(field: str, address: str) -> str:
    """Check an address to listen on, and return it; port 0 = any free one.

    Raises:
        ConfigError: nobody can listen on it.
    """
    kind, host, _ = _parts(field, address, "only TCP is supported, e.g. /ip4/0.0.0.0/tcp/4001")
    if kind in _NAMES:
        raise ConfigError(
            f"{field}: {address!r} is not /ip4/ADDRESS/tcp/PORT",
            f"give the address of {host} on this machine, or /ip4/0.0.0.0/tcp/PORT for all",
        )
    return address


def check_announce(field: str, address: str) -> str:
    """Check an address at which others are to dial us, and return it.

    Raises:
        ConfigError: nobody can dial it.
    """
    whole, mark, _ = address.rpartition("/p2p/")
    kind, host, port = _parts(field, whole if mark else address, _FORM)
    if port == 0:
        raise ConfigError(
            f"{field}: {address!r} names no port: nobody can dial 0",
            "give the port that is forwarded to this node",
        )
    if kind not in _NAMES and ipaddress.ip_address(host).is_unspecified:
        raise ConfigError(
            f"{field}: {address!r} names no host: it means every address of this machine",
            "give the one at which others reach this node, e.g. /dns4/NAME/tcp/PORT",
        )
    return address


def check_announced(field: str, addresses: Sequence[str]) -> None:
    """Check the addresses at which others are to dial us, each and together.

    Raises:
        ConfigError: nobody can dial one of them, or they do not fit into a member's card.
    """
    for address in addresses:
        check_announce(field, address)
        whole = address.rpartition("/p2p/")[0] or address
        if len(whole) > MAX_CHARS:
            raise ConfigError(
                f"{field}: {address!r} has {len(whole)} characters, at most {MAX_CHARS} are "
                "announced",
                "give a shorter host name",
            )
    number = len(addresses[:MAX_ADDRESSES])
    total = sum(len(a.rpartition("/p2p/")[0] or a) for a in addresses[:MAX_ADDRESSES])
    if total > MAX_TOTAL_CHARS:
        raise ConfigError(
            f"{field}: the first {number} addresses have {total} characters, at most "
            f"{MAX_TOTAL_CHARS} are announced",
            "give fewer of them, or shorter host names",
        )


def check_peer(field: str, address: str) -> str:
    """Check the address of a peer, and return it: it has to end in /p2p/PEERID.

    Raises:
        ConfigError: it does not, or nobody can dial it.
    """
    before, mark, peer_id = address.rpartition("/p2p/")
    remedy = "copy the whole address that `xpeer bootstrap` or `xpeer status --wide` prints"
    try:
        public_key_of(peer_id if mark and before.startswith("/") else "")
    except ValueError as e:
        raise ConfigError(
            f"{field}: {address!r} is not an address that ends in /p2p/PEERID", remedy
        ) from e
    if _parts(field, before, remedy)[2] == 0:
        raise ConfigError(f"{field}: {address!r} has port 0, which nobody can dial", remedy)
    return address


def is_public(address: str) -> bool:
    """Whether it is a name, or an address that others may reach from outside of its network."""
    _, kind, host, *_ = [*address.split("/"), "", "", ""]
    if kind in _NAMES:
        return True
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        return False


def _parts(field: str, address: str, remedy: str) -> tuple[str, str, int]:
    """Kind, host and port of /KIND/HOST/tcp/PORT."""
    parts = address.split("/")
    right = len(parts) == 5 and parts[0] == "" and parts[3] == "tcp"
    if not (right and _host(parts[1], parts[2]) and _port(parts[4])):
        raise ConfigError(f"{field}: {address!r} is not /ip4/ADDRESS/tcp/PORT or its like", remedy)
    return parts[1], parts[2], int(parts[4])


def _host(kind: str, host: str) -> bool:
    if kind in _NAMES:
        return _HOST_NAME.fullmatch(host) is not None
    try:
        ip_address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return kind == f"ip{ip_address.version}" and "%" not in host


def _port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5 and int(text) <= 65535
