"""`xpeer start`: first makes all quick checks, then becomes the daemon."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

import click

from xpeer import uncollected
from xpeer.cli.common import (
    GivenName,
    GivenPath,
    GivenText,
    ended_by_signals,
    home_option,
    load_config,
    say,
    say_foreign,
)
from xpeer.config import Home, NodeConfig
from xpeer.errors import ConfigError, NotAuthorisedError
from xpeer.paths import checked
from xpeer.policies import PrivacyMode

MAX_TOKEN_CHARS = 8192
_KNOWN_SEEDS = "known"
"""Value of --bootstrap without ADDR. An empty ADDR is different: it is an unset variable."""


@click.command()
@home_option
@click.option(
    "--bootstrap",
    "seeds",
    multiple=True,
    is_flag=False,
    flag_value=_KNOWN_SEEDS,
    metavar="[ADDR]",
    help="Join through this address (repeatable). Without ADDR: through the seeds known already.",
)
@click.option(
    "--join", metavar="TOKEN", help="Invitation: the token, file:PATH, or - for standard input."
)
@click.option(
    "--config",
    "config_path",
    type=GivenPath("file"),
    help="Settings to read, not HOME/config.toml.",
)
@click.option("--listen", multiple=True, metavar="ADDR", help="Multiaddress to listen on.")
@click.option("--announce", multiple=True, metavar="ADDR", help="Address to give to others.")
@click.option(
    "--shard",
    multiple=True,
    type=GivenText(),
    metavar="PATH",
    help="Text to train on: file, folder, glob.",
)
@click.option("--text-field", type=GivenName(), metavar="FIELD", help="As data.text_field.")
@click.option(
    "--privacy",
    type=click.Choice(get_args(PrivacyMode)),
    help="Start only if this is the swarm's privacy mode.",
)
@click.option("--name", metavar="NAME", help="Name of this node for the other members.")
@click.option("--min-peers", type=int, help="Wait for this many partners before training.")
@click.option(
    "--paused", is_flag=True, help="Join and serve, but take no steps until `xpeer resume`."
)
@click.option(
    "--from-initial",
    is_flag=True,
    help="Begin with the initial model, wait for no member. For a founder without checkpoints.",
)
@click.option(
    "--accept-donor",
    metavar="PEERID",
    help="Take over this member's parameters even if they are worse than the swarm's first.",
)
@click.option(
    "--log-format", type=click.Choice(["text", "json"]), help="Format of stderr and the log."
)
@click.option(
    "--base-model",
    type=GivenPath("folder", "model"),
    help="Folder of the model whose adapters the swarm trains.",
)
@click.option(
    "--tokenizer", type=GivenPath("folder", "tokenizer"), help="Folder of the swarm's tokenizer."
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check everything, count the text, time a step on public text; then exit.",
)
@click.option("--skip-trial", is_flag=True, help="With --dry-run: take no step.")
def start(
    home: Home,
    seeds: tuple[str, ...],
    join: str | None,
    config_path: Path | None,
    listen: tuple[str, ...],
    announce: tuple[str, ...],
    shard: tuple[str, ...],
    text_field: str | None,
    privacy: str | None,
    name: str | None,
    min_peers: int | None,
    paused: bool,
    from_initial: bool,
    accept_donor: str | None,
    log_format: str | None,
    base_model: Path | None,
    tokenizer: Path | None,
    dry_run: bool,
    skip_trial: bool,
) -> None:
    """Run this peer's daemon in the foreground, until SIGTERM or `xpeer stop`."""
    config = load_config(
        home,
        {
            "network.bootstrap": [seed for seed in seeds if seed != _KNOWN_SEEDS] or None,
            "network.listen": list(listen) or None,
            "network.announce": list(announce) or None,
            "network.name": name,
            "data.shard": list(shard) or None,
            "data.text_field": text_field,
            "data.privacy": privacy,
            "data.base_model": _absolute(base_model),
            "data.tokenizer": _absolute(tokenizer),
            "training.min_peers": min_peers,
            "daemon.log_format": log_format,
        },
        config_path,
    )
    home.socket(config)
    if accept_donor is not None:
        _check_donor(accept_donor)
    token = read_token(join)
    if token is not None:
        _check_token(home, token)
    # torch and hivemind take seconds to import: only now.
    with uncollected.imports():
        from xpeer_daemon import start as daemon  # noqa: PLC0415

    if dry_run:
        say_foreign()
        certificate = daemon.check(home, config, join_token=token)
        with ended_by_signals():
            _examine(home, config, observes=certificate.role == "observer", trial=not skip_trial)
        say("all is well; nothing was started")
        return
    code = daemon.run(
        home,
        config,
        join_token=token,
        paused=paused,
        from_initial=from_initial,
        accept_donor=accept_donor,
    )
    raise click.exceptions.Exit(code)


def read_token(argument: str | None) -> str | None:
    """Read a token from the argument itself, a file, or standard input. It is not checked.

    Raises:
        ConfigError: the file can't be read.
        NotAuthorisedError: the token is empty.
    """
    if argument is None:
        return None
    if argument == "-":
        text = sys.stdin.read(MAX_TOKEN_CHARS)
    elif argument.startswith("file:"):
        path = Path(checked("--join file:", argument.removeprefix("file:"))).expanduser()
        try:
            with path.open(encoding="utf-8") as file:
                text = file.read(MAX_TOKEN_CHARS)
        except UnicodeDecodeError as e:
            raise ConfigError(f"--join: {path} is not text", "name the token's own file") from e
        except OSError as e:
            raise ConfigError(
                f"--join: {path} can't be read: {e.strerror}", "check the path and its mode"
            ) from e
    else:
        text = argument
    if not text.strip():
        raise NotAuthorisedError(
            "--join: the token is empty", "ask an admin for one (`xpeer invite create`)"
        )
    return text.strip()


def _check_donor(peer_id: str) -> None:
    """Refuse a name: members choose their names themselves, and may choose another one's.

    Raises:
        ConfigError: it is no PeerID.
    """
    from xpeer.identity import public_key_of  # noqa: PLC0415 - cryptography only where a donor is

    try:
        public_key_of(peer_id)
    except ValueError as e:
        raise ConfigError(
            f"--accept-donor: {e}", "give the PeerID that `xpeer status` names"
        ) from e


def _check_token(home: Home, text: str) -> None:
    """Refuse a bad token before anything slow is imported. It writes nothing."""
    from xpeer import founding  # noqa: PLC0415 - cryptography only where a token is

    founding.check_token(home, text)


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.expanduser().absolute())


def _examine(home: Home, config: NodeConfig, *, observes: bool, trial: bool) -> None:
    """Print what a start would do.

    Raises:
        LocalError: a start would end with this error.
    """
    from xpeer.training.documents import name_documents  # noqa: PLC0415 - only a dry run needs it

    if observes:
        say("an observer trains on nothing")
        return
    if home.manifest.exists():
        from xpeer import dry_run  # noqa: PLC0415 - slow
        from xpeer.manifest.signed import SignedManifest  # noqa: PLC0415

        dry_run.examine(home, config, SignedManifest.load(home.manifest).open(), say, trial=trial)
        return
    setting = "data.corpus" if config.data.corpus else "data.shard"
    patterns = config.data.corpus or config.data.shard
    for line in name_documents(patterns, config.data.text_field, setting).summary.lines():
        say(f"{setting}: {line}")
    say("records, steps and speed: not known before a member has sent the manifest (first start)")
