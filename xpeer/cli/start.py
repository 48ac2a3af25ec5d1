"""`xpeer start`: checks everything that can be checked, then becomes the daemon."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from xpeer.cli.common import home_option, load_config, say
from xpeer.config import Home
from xpeer.errors import ConfigError


@click.command()
@home_option
@click.option(
    "--bootstrap",
    "seeds",
    multiple=True,
    is_flag=False,
    flag_value="",
    metavar="[ADDR]",
    help="Join through this address (repeatable). Without ADDR: through the seeds known already.",
)
@click.option("--join", metavar="TOKEN", help="Token, file:PATH, or - for standard input.")
@click.option(
    "--config", "config_path", type=click.Path(path_type=Path), help="Another config.toml."
)
@click.option("--listen", multiple=True, metavar="ADDR", help="Multiaddress to listen on.")
@click.option("--announce", multiple=True, metavar="ADDR", help="Address to tell others.")
@click.option(
    "--shard", multiple=True, metavar="PATH", help="Text to train on: file, folder, glob."
)
@click.option("--min-peers", type=int, help="Wait for this many partners before training.")
@click.option("--paused", is_flag=True, help="Join and serve, but take no steps until resume.")
@click.option("--log-format", type=click.Choice(["text", "json"]))
@click.option("--dry-run", is_flag=True, help="Check configuration, keys and text; start nothing.")
def start(
    home: Home,
    seeds: tuple[str, ...],
    join: str | None,
    config_path: Path | None,
    listen: tuple[str, ...],
    announce: tuple[str, ...],
    shard: tuple[str, ...],
    min_peers: int | None,
    paused: bool,
    log_format: str | None,
    dry_run: bool,
) -> None:
    """Run this peer's daemon in the foreground, until SIGTERM or `xpeer stop`."""
    settings = load_config(
        home,
        {
            "network.bootstrap": [seed for seed in seeds if seed] or None,
            "network.listen": list(listen) or None,
            "network.announce": list(announce) or None,
            "data.shard": list(shard) or None,
            "training.min_peers": min_peers,
            "daemon.log_format": log_format,
        },
        config_path,
    )
    # torch and hivemind take seconds to import: only now.
    from xpeer_daemon import service  # noqa: PLC0415

    if dry_run:
        service.check(home, settings, join_token=read_token(join))
        say("ok: nothing was started")
        return
    sys.exit(service.run(home, settings, join_token=read_token(join), paused=paused))


def read_token(argument: str | None) -> str | None:
    """A token given directly, in a file, or on standard input.

    Raises:
        ConfigError: the file can't be read.
    """
    if argument is None:
        return None
    if argument == "-":
        return sys.stdin.read(8192)
    if not argument.startswith("file:"):
        return argument
    path = Path(argument.removeprefix("file:"))
    try:
        return path.read_text(encoding="utf-8")[:8192]
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"--join: {path} can't be read: {e}", "check the path") from e
