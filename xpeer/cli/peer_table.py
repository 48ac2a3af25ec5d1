"""The table of `xpeer peers`: 80 characters with the main columns, or all columns.

Names and addresses in it come from other peers, so control characters are made visible.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from xpeer.cli.render import WIDTH, ago, is_back, size
from xpeer.escape import visible
from xpeer.health import duration
from xpeer.status import Partner

_COLUMNS = ("NAME", "ID", "PHASE", "STEP", "DONE", "FAILED", "LAST", "TOOK")
_WIDE_COLUMNS = (
    "PEER", "NAME", "STATE", "PHASE", "ROLE", "STEP", "SPEED", "PRIVACY", "LEDGER", "DONE",
    "FAILED", "SKIPPED", "LAST", "TOOK", "REASON", "IN", "OUT", "ADDRESS",
)  # fmt: skip
_NAME, _PHASE = 14, 12
"""Characters of a name and of a phase that are printed; --wide prints all of them."""


def peer_lines(partners: Sequence[Partner], *, wide: bool = False) -> list[str]:
    """The lines of the table. A member with failures gets a second line that says why.

    Args:
        partners: the members.
        wide: True = all columns, as wide as they need to be, and no second lines.
    """
    columns = _WIDE_COLUMNS if wide else _COLUMNS
    rows = [columns, *(_wide_row(partner) if wide else _peer_row(partner) for partner in partners)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns))]
    lines = []
    for row, partner in zip(rows, (None, *partners), strict=True):
        cells = (f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
        if partner is not None and not wide and (trouble := _trouble(partner)):
            lines += textwrap.wrap(
                visible(trouble), WIDTH, initial_indent="    ", subsequent_indent="    "
            )
    return lines


def _reason(partner: Partner) -> str:
    if partner.avoided_s > 0:
        return f"{partner.avoided_why}: avoided for {duration(partner.avoided_s)}"
    return partner.last_reason or "-"


def _trouble(partner: Partner) -> str:
    """Bad news that a row of the narrow table leaves out; empty if there is none."""
    news = []
    if partner.avoided_s > 0 or partner.failures:
        news.append(f"last failure: {_reason(partner)}" if partner.failures else _reason(partner))
    if is_back(partner):
        news.append(f"its ledger WENT BACK: {partner.ledger_went_back}")
    return "; ".join(news)


def _peer_row(partner: Partner) -> tuple[str, ...]:
    name, phase = visible(partner.name) or "-", visible(partner.phase or partner.state)
    return (
        name if len(name) <= _NAME else f"{name[: _NAME - 2]}..",
        visible(partner.peer_id[-8:])[:8], phase[:_PHASE], _step_of(partner, short=True),
        _count(partner.exchanges), _count(partner.failures),
        _brief(partner.last_exchange_age_s), _brief(partner.exchange_s, fine=True),
    )  # fmt: skip


def _wide_row(partner: Partner) -> tuple[str, ...]:
    cells = (
        partner.peer_id, partner.name or "-", partner.state, partner.phase or "-", partner.role,
        _step_of(partner), f"{partner.speed:g}" if partner.speed else "-",
        partner.privacy or "-", "WENT BACK" if is_back(partner) else "ok",
        str(partner.exchanges), str(partner.failures), str(partner.skipped),
        ago(partner.last_exchange_age_s), _brief(partner.exchange_s, fine=True),
        _reason(partner), size(partner.bytes_in), size(partner.bytes_out),
        partner.addresses[0] if partner.addresses else "-",
    )  # fmt: skip
    return tuple(visible(cell) for cell in cells)


def _step_of(partner: Partner, *, short: bool = False) -> str:
    if partner.step is None:
        return "-"
    return _count(partner.step) if short else str(partner.step)


def _count(number: int) -> str:
    """A number in seven characters at most."""
    if number < 1_000_000:
        return str(number)
    return f"{number / 1e6:.0f}M" if number < 10**11 else "..."


def _brief(seconds: float | None, *, fine: bool = False) -> str:
    """A duration in one unit."""
    if seconds is None:
        return "-"
    return f"{seconds:.1f}s" if fine and seconds < 60 else duration(seconds).partition(" ")[0]
