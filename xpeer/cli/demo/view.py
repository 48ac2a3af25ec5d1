"""The demo's progress on stderr: a live table and a bar on a terminal, else lines now and then."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from xpeer.cli.render import size
from xpeer.status import Status

PLAIN_EVERY_S = 15.0
PLAIN_WIDTH = 100
"""Characters of a line in a log; rich would guess 80 and cut the table."""

_COLUMNS = ("peer", "state", "step", "train", "valid.", "tok/s", "exchanges", "epsilon", "sent",
            "distance")  # fmt: skip


class View:
    """What a person sees while the demo runs."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        if not self._console.is_terminal:
            self._console.width = PLAIN_WIDTH
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), console=self._console,
        )  # fmt: skip
        self._table: RenderableType = ""
        self._task = self._progress.add_task("", total=1, visible=False)
        self._live: Live | None = None
        self._said_at = 0.0

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Draw until the block ends."""
        if not self._console.is_terminal:
            yield
            return
        with Live(self._drawn(), console=self._console, refresh_per_second=4) as self._live:
            yield

    def phase(self, what: str, total: int) -> None:
        """Begin a phase with this many parts."""
        self._table = ""
        self._progress.update(self._task, visible=False)
        self._task = self._progress.add_task(what, total=total)
        self._said_at = 0.0
        if not self._console.is_terminal:
            self._console.print(what)
        self._refresh()

    def advance(self) -> None:
        """Count one more part as done."""
        self._progress.advance(self._task)
        self._refresh()

    def to(self, done: int, total: int) -> None:
        """Set how many parts are done."""
        self._progress.update(self._task, completed=done, total=total)
        self._refresh()

    def show(self, statuses: Mapping[str, Status | None]) -> None:
        """Draw the table of peers. None = a daemon that does not answer yet."""
        table = Table(box=None, pad_edge=False)
        columns = _COLUMNS if self._console.width >= PLAIN_WIDTH else _COLUMNS[:-2]
        for column in columns:
            left = column in ("peer", "state")
            table.add_column(column, justify="left" if left else "right", no_wrap=True)
        for name, status in statuses.items():
            table.add_row(*_row(name, status)[: len(columns)])
        self._table = table
        self._refresh()
        if not self._console.is_terminal and time.monotonic() - self._said_at > PLAIN_EVERY_S:
            self._said_at = time.monotonic()
            self._console.print(table)

    def print(self, table: Table) -> None:
        """Print the report's table, on stderr, since stdout is for --json."""
        self._console.print(table)

    def _drawn(self) -> Group:
        return Group(self._table, self._progress)

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._drawn())


def _row(label: str, status: Status | None) -> list[str]:
    if status is None:
        return [label, "starting", *[""] * (len(_COLUMNS) - 2)]
    progress, privacy = status.progress, status.privacy
    return [
        label,
        status.state,
        str(progress.step),
        _loss(progress.loss_train),
        _loss(progress.loss_validation),
        f"{progress.tokens_per_s:,.0f}",
        str(status.exchanges_done),
        f"{privacy.epsilon_spent:.2f}/{privacy.epsilon_target:g}",
        size(status.bytes_out),
        "" if progress.consensus_distance is None else f"{progress.consensus_distance:.4f}",
    ]


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
