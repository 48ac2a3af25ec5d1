"""`xpeer bootstrap`: a DHT entry point."""

from __future__ import annotations

import sys

import click

from xpeer.cli.common import home_option, json_option, load_config
from xpeer.cli.start import read_token
from xpeer.config import Home
from xpeer.errors import ConfigError


@click.command()
@home_option
@json_option
@click.option("--swarm", "swarm_id", metavar="ID", help="Fingerprint that `xpeer init` printed.")
@click.option("--join", metavar="TOKEN", help="Infrastructure token, instead of --swarm.")
@click.option("--listen", multiple=True, metavar="ADDR", help="Multiaddress to listen on.")
@click.option("--announce", multiple=True, metavar="ADDR", help="Address to give to others.")
@click.option("--bootstrap", "seeds", multiple=True, metavar="ADDR", help="Another entry point.")
def bootstrap(
    home: Home,
    as_json: bool,
    swarm_id: str | None,
    join: str | None,
    listen: tuple[str, ...],
    announce: tuple[str, ...],
    seeds: tuple[str, ...],
) -> None:
    """Run a DHT entry point for one swarm; it holds no swarm key and can read nothing.

    Prints one address a line once it can be reached, and serves until SIGTERM.
    """
    if (swarm_id is None) == (join is None):
        raise ConfigError(
            "--swarm and --join: one of them is needed", "`xpeer init` prints the swarm's ID"
        )
    config = load_config(
        home,
        {
            "network.listen": list(listen) or None,
            "network.announce": list(announce) or None,
            "network.bootstrap": list(seeds) or None,
        },
    )
    from xpeer_bootstrap import node  # noqa: PLC0415 - hivemind takes seconds to import

    sys.exit(node.run(home, config, swarm_id=swarm_id, token=read_token(join), as_json=as_json))
