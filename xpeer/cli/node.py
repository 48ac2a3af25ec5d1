"""Commands that talk to a running daemon. They must answer at once, so imports are few."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from xpeer.cli import render
from xpeer.cli.common import Number, echo_json, home_option, json_option, load_config, say
from xpeer.cli.peer_table import peer_lines
from xpeer.config import Home
from xpeer.control import Client, Peers
from xpeer.errors import ExitCode, LocalError, NotRunningError
from xpeer.escape import json_text
from xpeer.status import Status

GRACE_S = 15.0
"""Once the daemon is silent, `stop` waits for daemon.stop_timeout_s and this much longer."""


def client_of(home: Home) -> Client:
    """The client for a home's daemon."""
    return Client(home.socket(load_config(home)))


@click.command(short_help="What the daemon is doing, and its health.")
@home_option
@json_option
@click.option("-w", "--watch", is_flag=True, help="Show the status anew until Ctrl-C.")
@click.option(
    "--interval", "interval_s", type=Number(0.05, 86400), default=1.0, show_default=True,
    help="Seconds between two statuses of --watch.",
)  # fmt: skip
@click.option("--exit-code", is_flag=True, help="Exit 4 if the node is not ok.")
@click.option("--wide", is_flag=True, help="Don't wrap lines, so that addresses can be copied.")
def status(
    home: Home, as_json: bool, watch: bool, interval_s: float, exit_code: bool, wide: bool
) -> None:
    """Print health and its reasons, then training, privacy and exchanges."""
    ask = client_of(home).status
    if watch:
        _watch(ask, interval_s, as_json=as_json)
    answer = ask()
    if as_json:
        echo_json(answer)
    else:
        render.show(render.status_lines(answer, wide=wide))
    if exit_code and answer.health != "ok":
        raise click.exceptions.Exit(int(ExitCode.DEGRADED))


@click.command(short_help="The members of the swarm as this node sees them.")
@home_option
@json_option
@click.option("--wide", is_flag=True, help="All columns, with whole PeerIDs and addresses.")
def peers(home: Home, as_json: bool, wide: bool) -> None:
    """List the members this peer sees, and how exchanges with them went."""
    partners = client_of(home).peers()
    if as_json:
        echo_json(Peers(peers=partners))
    else:
        render.show(peer_lines(partners, wide=wide))


@click.command(short_help="Stop training and exchanging for a while.")
@home_option
def pause(home: Home) -> None:
    """Have the node take no steps and exchange nothing until `xpeer resume`."""
    state = client_of(home).pause()
    say("paused" if state in ("", "paused") else f"{state}: it pauses once it would begin")


@click.command(short_help="Undo pause.")
@home_option
def resume(home: Home) -> None:
    """Undo `xpeer pause`."""
    state = client_of(home).resume()
    say(f"resumed: {state}" if state else "resumed")


_timeout_option = click.option(
    "--timeout", "timeout_s", type=Number(0, 1e7, min_open=True), metavar="SECONDS",
    help="Longest wait for the daemon's end [default: as long as it makes progress].",
)  # fmt: skip


@click.command(short_help="Stop the daemon; it saves a checkpoint first.")
@home_option
@_timeout_option
def stop(home: Home, timeout_s: float | None) -> None:
    """Save a checkpoint and stop the daemon; return when it is gone."""
    _end(home, timeout_s, leave=False)
    say("stopped")


@click.command(short_help="Tell the swarm, then stop the daemon.")
@home_option
@_timeout_option
@click.option(
    "--remove-tokens", is_flag=True, help="Also remove the tokenised text from the home's cache."
)
def leave(home: Home, timeout_s: float | None, remove_tokens: bool) -> None:
    """Tell the other members that this peer leaves, then stop the daemon.

    The home stays, and what is in it is listed. With --remove-tokens no daemon need be running.
    """
    try:
        _end(home, timeout_s, leave=True)
        say("left and stopped")
    except NotRunningError:
        if not (remove_tokens and home.tokens.exists()):
            raise
        say("no daemon runs here, so nobody is told")
    if remove_tokens:
        _remove_tokens(home)
    for line in _remains(home):
        say(line)


def _end(home: Home, timeout_s: float | None, *, leave: bool) -> None:
    config = load_config(home)
    wait_s = config.daemon.stop_timeout_s + GRACE_S if timeout_s is None else timeout_s
    Client(home.socket(config)).stop_and_wait(wait_s, leave=leave, patient=timeout_s is None)


def _remove_tokens(home: Home) -> None:
    """Remove the tokens of the shard, unless somebody is using the home."""
    from xpeer_daemon.lock import HomeLock  # noqa: PLC0415 - seldom needed

    try:
        if not home.tokens.exists():
            return
        with HomeLock.acquire(home):
            num_bytes = _num_bytes(home.tokens)
            shutil.rmtree(home.tokens)
    except OSError as e:
        raise LocalError(
            f"{e.filename or home.tokens} can't be removed: {e.strerror or e}",
            f"remove {home.tokens} as the user whose home it is",
        ) from e
    say(f"removed: {home.tokens}, {render.size(num_bytes)}")


def _remains(home: Home) -> Iterator[str]:
    """What a node that has left still has on the disk."""
    parts = {
        home.tokens: "the tokenised text, as private as the text itself: leave with "
                     "--remove-tokens, or remove it yourself",
        home.checkpoints: "the model; `xpeer checkpoint export` needs it",
        home.own: "own models, by `xpeer finetune`",
        home.initial_model: "the model that the swarm began with",
        home.joining: "parameters that were not taken over; they can go",
        home.held_out: "which text is held out: keep it for as long as the models",
        home.ledger_db: "what privacy cost: keep it, what was spent stays spent",
        home.admin_key: "the key that invites members: keep it",
        home.identity_key: "the key of this PeerID: whoever has it can come back",
    }  # fmt: skip
    try:
        for path, what in parts.items():
            if path.exists():
                yield f"left on the disk: {path}, {render.size(_num_bytes(path))}: {what}"
        others = [path.name for path in home.parts() if path not in parts and path.exists()]
        if others:
            names = ", ".join(others)
            yield f"left on the disk: in {home.path}: membership, settings and history: {names}"
    except OSError as e:
        yield f"what is left in {home.path} can't be listed: {e.strerror or e}"


def _num_bytes(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum(
        Path(where, name).lstat().st_size for where, _, names in os.walk(path) for name in names
    )


def _watch(ask: Callable[[], Status], interval_s: float, *, as_json: bool) -> None:
    """Print a status again and again until Ctrl-C or the daemon's end.

    On a terminal it is redrawn. Elsewhere each is a line.
    """
    if as_json or not sys.stdout.isatty():
        for answer in _looks(ask, interval_s):
            line = json_text(answer) if as_json else render.summary(answer)
            click.echo(line)
        return
    from rich.live import Live  # noqa: PLC0415 - only --watch on a terminal needs it

    with Live(console=render.console(), auto_refresh=False) as view:
        for answer in _looks(ask, interval_s):
            view.update(render.painted(render.status_lines(answer)), refresh=True)


def _looks(ask: Callable[[], Status], interval_s: float) -> Iterator[Status]:
    while True:
        yield ask()
        time.sleep(interval_s)
