"""`xpeer invite`: the admin's side of joining."""

from __future__ import annotations

import re
import time

import click

from xpeer.cli.common import echo_json, home_option, json_option, load_config, say
from xpeer.config import Home
from xpeer.control import Client
from xpeer.errors import ConfigError, NotAuthorisedError, NotRunningError
from xpeer.identity import Identity, PeerId, public_key_of
from xpeer.manifest import SignedManifest
from xpeer.network.invites import create_token
from xpeer.network.membership import Role

UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


@click.group()
def invite() -> None:
    """Make invitations. Needs the admin key that `xpeer init` made."""


@invite.command()
@home_option
@json_option
@click.option("--for", "for_peer", metavar="PEERID", help="Only this peer can use it (safest).")
@click.option(
    "--role", type=click.Choice(["member", "observer", "infrastructure"]), default="member",
    show_default=True, help="What it grants.",
)  # fmt: skip
@click.option(
    "--ttl", default="24h", show_default=True, help="It expires after this: 30m, 24h, 7d."
)
@click.option("--seed", "seeds", multiple=True, metavar="ADDR", help="Where to join (repeatable).")
def create(
    home: Home, as_json: bool, for_peer: str | None, role: Role, ttl: str, seeds: tuple[str, ...]
) -> None:
    """Print a token; without --for anybody who holds it before it expires can join with it.

    A use limit of such a bearer token would need a server: there is none.
    """
    admin = _admin_key(home)
    manifest = SignedManifest.load(home.manifest)
    if for_peer is not None:
        _check_peer_id(for_peer)
    known = list(seeds) or _known_seeds(home)
    if not known:
        raise ConfigError(
            "--seed: no address is known at which the swarm can be joined",
            "start the daemon first, set network.bootstrap, or give --seed ADDR",
        )
    token = create_token(
        admin,
        manifest.genesis,
        name=manifest.open().name,
        seeds=known,
        for_peer=PeerId(for_peer) if for_peer else None,
        role=role,
        ttl_s=_seconds(ttl),
        now_unix_s=time.time(),
    )
    # A bearer token is a secret, and command lines are readable by everybody on a machine.
    given = str(token) if for_peer else "file:TOKEN_FILE"
    commands = [f"xpeer start --join {given} --shard /path/to/text"]
    if as_json:
        expires = token.certificate.join_before_unix_s
        echo_json({"token": str(token), "expires_unix_s": expires, "commands": commands})
        return
    click.echo(str(token))
    say(f"valid for {ttl}, {'for ' + for_peer if for_peer else 'for whoever holds it'}; to join:")
    for command in commands:
        say(f"  {command}")


def _admin_key(home: Home) -> Identity:
    if not home.admin_key.exists():
        raise NotAuthorisedError(
            f"home {home.path} holds no admin key", "invitations are made where `xpeer init` ran"
        )
    return Identity.load(home.admin_key)


def _known_seeds(home: Home) -> list[str]:
    """What the settings name, and where our own daemon listens."""
    config = load_config(home)
    seeds = list(config.network.bootstrap)
    try:
        seeds += Client(home.socket(config)).status().addresses
    except NotRunningError:
        say("note: the daemon does not run, so the token names no address of it")
    return seeds[:16]


def _check_peer_id(peer_id: str) -> None:
    try:
        public_key_of(peer_id)
    except ValueError as e:
        raise ConfigError(f"--for: {e}", "the joiner reads its PeerID from `xpeer id`") from e


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+)([smhd])", text)
    if match is None or not int(match[1]):
        raise ConfigError(f"--ttl: {text!r} is not a time", "write e.g. 30m, 24h or 7d")
    return float(match[1]) * UNITS_S[match[2]]
