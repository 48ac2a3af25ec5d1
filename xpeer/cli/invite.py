"""`xpeer invite`: the admin's side of joining."""

from __future__ import annotations

import re
import time

import click

from xpeer import founding
from xpeer.cli.common import (
    echo,
    echo_json,
    home_option,
    json_option,
    load_config,
    say,
    secure_home,
)
from xpeer.config import Home
from xpeer.control import Client
from xpeer.errors import (
    ConfigError,
    LocalTimeoutError,
    NotAuthorisedError,
    NotRunningError,
)
from xpeer.founding import Issued
from xpeer.identity import Identity, PeerId, public_key_of
from xpeer.manifest.signed import SignedManifest
from xpeer.needs import Needs
from xpeer.network.membership.certificates import Role
from xpeer.network.membership.invites import MAX_SEEDS, MEMBERSHIP_S, create_token
from xpeer.network.multiaddress import check_peer, is_public

UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DAEMON_TIMEOUT_S = 3.0


@click.group()
def invite() -> None:
    """Make invitations. Needs the admin key that `xpeer init` made."""


@invite.command()
@home_option
@json_option
@click.option("--for", "for_peer", metavar="PEERID", help="Only peer that can use it (safest).")
@click.option(
    "--role",
    type=click.Choice(["member", "observer", "infrastructure"]),
    default="member",
    show_default=True,
    help="Role that the token grants.",
)
@click.option(
    "--ttl", default="24h", show_default=True, help="Time until it expires: 30m, 24h, 7d."
)
@click.option(
    "--seed", "seeds", multiple=True, metavar="ADDR", help="Address to join at (repeatable)."
)
@click.option(
    "--no-seed", is_flag=True, help="Put no address into the token: the newcomer gives --bootstrap."
)
def create(
    home: Home,
    as_json: bool,
    for_peer: str | None,
    role: Role,
    ttl: str,
    seeds: tuple[str, ...],
    no_seed: bool,
) -> None:
    """Print a token. Without --for it is a bearer token: anybody who holds it can join with it.

    There is no limit of uses: a bearer token works until it expires. A limit would need a server,
    and there is none.
    """
    secure_home(home)
    admin = _admin_key(home)
    signed = SignedManifest.load(home.manifest)
    manifest = signed.open()
    if signed.admin != admin.verify_key:
        raise NotAuthorisedError(
            f"{home.admin_key} is not the admin key of {home.manifest}", "restore both files"
        )
    if for_peer is not None:
        _check_peer_id(for_peer)
    if seeds and no_seed:
        raise ConfigError("--seed and --no-seed exclude one another", "keep one")
    needs = Needs.of(manifest) if role == "member" else None
    token = create_token(
        admin,
        signed.genesis,
        name=manifest.name,
        seeds=[] if no_seed else _seeds(home, seeds),
        for_peer=PeerId(for_peer) if for_peer else None,
        role=role,
        ttl_s=_seconds(ttl),
        now_unix_s=time.time(),
        needs=needs,
    )
    issued = Issued.of(token)
    founding.record_invite(home, issued)
    bootstrap = "" if token.seeds else " --bootstrap ADDR"
    joins = "bootstrap" if role == "infrastructure" else "start"
    text = " --shard /path/to/text" if role == "member" else ""
    if needs is not None:
        text += "".join(f" {option}" for option in needs.options())
    commands = [f"xpeer {joins} --join TOKEN{text}{bootstrap}"]
    if role != "infrastructure":
        commands.append(f"xpeer init --join TOKEN{text}{bootstrap}   # then: xpeer start")
    if as_json:
        filled = [command.replace("TOKEN", str(token)) for command in commands]
        echo_json({"token": str(token), "invite": issued, "commands": filled})
        return
    say(f"valid for {ttl}, {'for ' + for_peer if for_peer else 'for whoever holds it'}; to join:")
    for command in commands:
        say(f"  {command}")
    for item in needs.in_words() if needs is not None else ():
        say(f"the newcomer needs {item}")
    say("TOKEN is the line below, or file:PATH, or - for standard input")
    say(f"fingerprint to compare: {issued.swarm_id}")
    click.echo(str(token))


@invite.command(name="list")
@home_option
@json_option
def list_command(home: Home, as_json: bool) -> None:
    """List the invitations that were made here. Their tokens are not kept."""
    invites = founding.load_invites(home)
    if as_json:
        echo_json(invites)
        return
    now = time.time()
    for entry in invites:
        left = entry.join_before_unix_s - now
        state = f"for {left / 3600:.1f} h" if left > 0 else "expired"
        echo(f"{entry.serial:016x}  {entry.role:14}  {state:12}  {entry.subject}")
    if not invites:
        say("no invitation was made here")


def _admin_key(home: Home) -> Identity:
    if not home.admin_key.exists():
        raise NotAuthorisedError(
            f"home {home.path} holds no admin key", "invitations are made where `xpeer init` ran"
        )
    return Identity.load(home.admin_key)


def _seeds(home: Home, given: tuple[str, ...]) -> list[str]:
    """The given seeds; if there are none, those in the settings and our own daemon's addresses."""
    if given:
        return [check_peer("--seed", seed) for seed in given]
    config = load_config(home)
    seeds = [check_peer("network.bootstrap", seed) for seed in config.network.bootstrap]
    try:
        seeds += Client(home.socket(config), _DAEMON_TIMEOUT_S).status().addresses
    except NotRunningError:
        say("note: the daemon does not run, so the token names no address of it")
    except LocalTimeoutError as e:
        say(f"note: {e.problem}, so the token names no address of it")
    if not seeds:
        raise ConfigError(
            "--seed: no address is known at which the swarm can be joined",
            "start the daemon first, set network.bootstrap, or give --seed ADDR (or --no-seed)",
        )
    seeds = list(dict.fromkeys(seeds))[:MAX_SEEDS]
    if not any(map(is_public, seeds)):
        places = ", ".join(seed.partition("/p2p/")[0] for seed in seeds)
        say(
            f"note: others reach {places} only within this network: set network.announce to where "
            "they reach this node, or give --seed"
        )
    return seeds


def _check_peer_id(peer_id: str) -> None:
    try:
        public_key_of(peer_id)
    except ValueError as e:
        raise ConfigError(f"--for: {e}", "the newcomer's `xpeer id` prints its PeerID") from e


def _seconds(text: str) -> float:
    match = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
    if match is None or not int(match[1]):
        raise ConfigError(f"--ttl: {text!r} is not a time", "write e.g. 30m, 24h or 7d")
    seconds = int(match[1]) * UNITS_S[match[2]]
    if seconds > MEMBERSHIP_S:
        raise ConfigError(
            f"--ttl: {text} is longer than a membership ({MEMBERSHIP_S // 86400}d)",
            "choose a shorter time, such as 24h or 7d",
        )
    return float(seconds)
