"""`xpeer events`: reads the history that the daemon keeps in state.sqlite, running or not."""

from __future__ import annotations

import time
from contextlib import closing
from typing import TYPE_CHECKING

import click
import msgspec

from xpeer.cli.common import Whole, echo_json, home_option, json_option
from xpeer.config import Home
from xpeer.control import Versioned
from xpeer.errors import NotRunningError
from xpeer.escape import visible
from xpeer.leaves import Parts, seen_by
from xpeer_daemon.store import EventRow, RoundRow, Store

if TYPE_CHECKING:
    from collections.abc import Iterator

_SHORT = 8
"""Characters at the end of a PeerID that are printed; they differ between members."""


@seen_by("node", "printed by xpeer events")
class History(Versioned, frozen=True, kw_only=True):
    """The answer of `xpeer events --json`; the latest entries come last."""

    events: Parts[list[EventRow]] = msgspec.field(default_factory=list)
    exchanges: Parts[list[RoundRow]] = msgspec.field(default_factory=list)


@click.command()
@home_option
@json_option
@click.option("--exchanges", is_flag=True, help="Show exchanges, and why some of them failed.")
@click.option(
    "-n", "--tail", type=Whole(0, 100_000), default=50, show_default=True, help="Most to show."
)
def events(home: Home, as_json: bool, exchanges: bool, tail: int) -> None:
    """Show what happened to this node: restarts, donors, ledgers that went back, the end."""
    if not home.state_db.exists():
        raise NotRunningError(
            f"there is no history {home.state_db}", "has `xpeer start` run on this home? See --home"
        )
    with closing(Store.open_readonly(home.state_db)) as store:
        history = History(
            events=[] if exchanges else store.events(tail)[::-1],
            exchanges=store.rounds(tail)[::-1] if exchanges else [],
        )
    if as_json:
        echo_json(history)
        return
    for line in _lines(history):
        click.echo(visible(line))


def _lines(history: History) -> Iterator[str]:
    for event in history.events:
        yield f"{_when(event.unix_s)}  {event.kind}  {event.detail}".rstrip()
    for row in history.exchanges:
        who = row.partner[-_SHORT:] or "nobody"
        what = f"fragment {row.fragment}" if row.fragment is not None else ""
        yield f"{_when(row.unix_s)}  slot {row.slot}  {who}  {_outcome(row)}  {what}".rstrip()


def _outcome(row: RoundRow) -> str:
    if row.reason:
        return f"{row.reason}: {row.detail}" if row.detail else row.reason
    took = "" if row.seconds is None else f" in {row.seconds:.2f} s"
    distance = "" if row.distance is None else f", distance {row.distance:.4f}"
    return f"merged{took}{distance}"


def _when(unix_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(unix_s))
