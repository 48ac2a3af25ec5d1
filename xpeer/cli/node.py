"""Commands that ask or tell a running daemon."""

from __future__ import annotations

import os
import sys
import time

import click
import msgspec

from xpeer.cli.common import echo_json, home_option, json_option, load_config, say
from xpeer.cli.render import partner_lines, status_lines
from xpeer.config import Home
from xpeer.control import Control
from xpeer.errors import ExitCode, LocalError, LocalTimeoutError
from xpeer.status import SCHEMA_VERSION, Status

POLL_S = 0.1


def control_of(home: Home) -> Control:
    """The client for a home's daemon."""
    return Control(home.socket(load_config(home)))


def fetch_status(home: Home) -> Status:
    """Ask the daemon.

    Raises:
        LocalError: it speaks another schema.
    """
    answer = control_of(home).get("status")
    if answer.get("schema_version") != SCHEMA_VERSION:
        raise LocalError(
            f"the daemon speaks status schema {answer.get('schema_version')}, "
            f"this command {SCHEMA_VERSION}",
            "restart the daemon after an upgrade",
        )
    return msgspec.convert(answer, Status)


@click.command()
@home_option
@json_option
@click.option("-w", "--watch", is_flag=True, help="Show it anew every second until Ctrl-C.")
@click.option("--exit-code", is_flag=True, help="Exit 4 if the node is degraded.")
def status(home: Home, as_json: bool, watch: bool, exit_code: bool) -> None:
    """Say how this peer is doing; the health line and its reasons come first."""
    while True:
        answer = fetch_status(home)
        if as_json:
            echo_json(answer)
        else:
            if watch and sys.stdout.isatty():
                click.clear()
            click.echo("\n".join(status_lines(answer)))
        if not watch:
            break
        time.sleep(1.0)
    if exit_code and answer.health != "ok":
        sys.exit(int(ExitCode.DEGRADED))


@click.command()
@home_option
@json_option
def peers(home: Home, as_json: bool) -> None:
    """List the members this peer knows, and how exchanges with them went."""
    answer = fetch_status(home)
    if as_json:
        echo_json(answer.partners)
    else:
        click.echo("\n".join(partner_lines(answer.partners)))


@click.command()
@home_option
def pause(home: Home) -> None:
    """Take no steps and no exchanges until `xpeer resume`."""
    control_of(home).post("pause", timeout_s=120)


@click.command()
@home_option
def resume(home: Home) -> None:
    """Undo `xpeer pause`."""
    control_of(home).post("resume", timeout_s=120)


_timeout = click.option(
    "--timeout", "timeout_s", default=60.0, show_default=True, help="Seconds to wait for the end."
)


@click.command()
@home_option
@_timeout
def stop(home: Home, timeout_s: float) -> None:
    """Finish or abandon the step, save, and stop the daemon."""
    _end(home, "stop", timeout_s)


@click.command()
@home_option
@_timeout
def leave(home: Home, timeout_s: float) -> None:
    """Tell the other members that this peer leaves, save, and stop the daemon."""
    _end(home, "leave", timeout_s)


def _end(home: Home, how: str, timeout_s: float) -> None:
    pid = fetch_status(home).pid
    control_of(home).post(how)
    deadline = time.monotonic() + timeout_s
    while _alive(pid):
        if time.monotonic() > deadline:
            raise LocalTimeoutError(
                f"the daemon (pid {pid}) still runs after {timeout_s:g} s", "see `xpeer logs`"
            )
        time.sleep(POLL_S)
    say("stopped")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
