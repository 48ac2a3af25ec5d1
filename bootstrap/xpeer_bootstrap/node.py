"""The bootstrap node: it answers introductions and holds DHT records that it can't read.

It knows the swarm's fingerprint and nothing else: no swarm key, no manifest. Peers go on without
it when it is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import sys
import time
from collections.abc import Iterator

import msgspec
import uvloop

from xpeer import founding, sdnotify, signals
from xpeer.config import Home, NodeConfig
from xpeer.config_sources import note_of_foreign
from xpeer.errors import ConfigError, ExitCode, LocalError
from xpeer.files import open_own, secure
from xpeer.identity import Identity
from xpeer.network.addresses import peer_of, resolve_listen
from xpeer.network.membership.certificates import Credential, Membership
from xpeer.network.membership.invites import Token
from xpeer.network.multiaddress import check_announce
from xpeer.network.swarm import Swarm

log = logging.getLogger("xpeer.bootstrap")


def run(
    home: Home, config: NodeConfig, *, swarm_id: str | None, token: str | None, as_json: bool
) -> int:
    """Serve until a signal of `signals.ENDING`.

    Args:
        home: holds this node's own key; one is made if there is none.
        config: its network section is used.
        swarm_id: fingerprint of the swarm, 64 hex digits; None if there is a token.
        token: an infrastructure token for this PeerID; None if there is a fingerprint. With it
            members know who this node is.
        as_json: print one JSON object instead of addresses.

    Returns:
        The exit code.

    Raises:
        LocalError: it can't start.
    """
    if swarm_id is not None:
        _check_fingerprint(swarm_id)
    listen = resolve_listen(config.network.listen)
    for address in config.network.announce:
        check_announce("network.announce", address)
    for seed in config.network.bootstrap:
        peer_of(seed)
    credential: Credential | None = None
    parsed = Token.parse(token) if token is not None else None
    closed = secure(home)
    identity = founding.ensure_identity(home)
    if parsed is not None:
        credential = parsed.credential_for(identity, time.time())
        swarm_id = parsed.swarm_id
    # As in the daemon, libraries log from level warning on.
    logging.basicConfig(level="WARNING", format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("xpeer").setLevel(config.daemon.log_level.upper())
    for note in (*closed, note_of_foreign(os.environ)):
        if note:
            log.warning("%s", note)
    with _locked(home):
        membership = Membership(swarm_id or "", credential)
        return uvloop.run(_serve(home, config, listen, identity, membership, as_json))


async def _serve(
    home: Home,
    config: NodeConfig,
    listen: list[str],
    identity: Identity,
    membership: Membership,
    as_json: bool,
) -> int:
    stopping, loop = asyncio.Event(), asyncio.get_running_loop()
    signals.end_by(loop, stopping.set)
    swarm = await Swarm.start(
        identity,
        home.identity_key,
        membership,
        listen=listen,
        announce=config.network.announce,
        seeds=config.network.bootstrap,
        nat_port_map=config.network.nat_port_map,
    )
    try:
        _print_addresses(swarm.addresses, membership.swarm_id, as_json)
        sdnotify.notify(f"READY=1\nSTATUS=serving {membership.swarm_id[:16]}")
        interval_s = sdnotify.watchdog_interval_s() or 60.0
        while not stopping.is_set():
            sdnotify.notify(f"WATCHDOG=1\nSTATUS={swarm.neighbours} DHT neighbours")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await stopping.wait()
    finally:
        sdnotify.notify("STOPPING=1")
        await swarm.close()
    return int(ExitCode.OK)


def _print_addresses(addresses: list[str], swarm_id: str, as_json: bool) -> None:
    if as_json:
        line = {"swarm_id": swarm_id, "addresses": addresses}
        print(msgspec.json.encode(line).decode(), flush=True)
        return
    for address in addresses:
        print(address, flush=True)
    print("peers join through it with:", file=sys.stderr)
    for address in addresses:
        print(f"  xpeer start --bootstrap {address}", file=sys.stderr, flush=True)


def _check_fingerprint(swarm_id: str) -> None:
    if len(swarm_id) != 64 or set(swarm_id) - set("0123456789abcdef"):
        raise ConfigError(
            f"--swarm: {swarm_id!r} is not a swarm's fingerprint (64 hex digits)",
            "copy it from `xpeer init` or `xpeer status --json`",
        )


@contextlib.contextmanager
def _locked(home: Home) -> Iterator[None]:
    try:
        fd = open_own(home.lock, os.O_RDWR | os.O_CREAT)
    except OSError as e:
        raise ConfigError(
            f"home {home.path} can't be used: {home.lock.name}: {e.strerror}",
            "check --home and the folder's owner",
        ) from e
    with os.fdopen(fd, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise LocalError(
                f"another node runs on home {home.path}", "stop it, or choose another --home"
            ) from e
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
