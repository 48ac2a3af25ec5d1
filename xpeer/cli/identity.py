"""`xpeer id`: the PeerID that an admin needs for an invitation."""

from __future__ import annotations

import click

from xpeer.cli.common import echo_json, home_option, json_option, say, secure_home
from xpeer.config import Home
from xpeer.founding import ensure_identity


@click.command(name="id")
@home_option
@json_option
def id_command(home: Home, as_json: bool) -> None:
    """Print this node's PeerID; make its key if there is none."""
    secure_home(home)
    fresh = not home.identity_key.exists()
    peer_id = ensure_identity(home).peer_id
    if fresh:
        say(f"made a new key: {home.identity_key} (keep a copy of it in a safe place)")
    if as_json:
        echo_json({"peer_id": peer_id, "key": str(home.identity_key)})
    else:
        click.echo(peer_id)
