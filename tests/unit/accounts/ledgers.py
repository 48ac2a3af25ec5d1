"""Ledgers and charges, as tests make them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path

from xpeer.accounts.accountant import Segment
from xpeer.accounts.chain import ChargeChain, ChargeContext, Row
from xpeer.accounts.histories import ByUnit, History
from xpeer.accounts.ledger import Ledger
from xpeer.accounts.register import Register
from xpeer.errors import LocalError

ROOT = Path(__file__).parents[3]
"""Where processes of their own can import this."""


def about_in(swarm_id: str, delta: float = 1e-5) -> ChargeContext:
    """What charges in a swarm are for."""
    return ChargeContext(swarm_id, "record", 1.0, delta, 8.0)


def open_declared(
    path: Path,
    documents: Iterable[str] = ("a document",),
    *,
    register: Path | None = None,
    about: ChargeContext | None = None,
) -> Ledger:
    """Open a ledger that can be charged: its documents are declared, as a trainer does.

    Args:
        path: of the ledger.
        documents: ids.
        register: folder of the machine's register; None = `register` beside the ledger.
        about: what the charges are for; None = records in "swarm".
    """
    ledger = Ledger.open(path)
    try:
        machine = Register.open(register or path.with_name("register"))
        ledger.declare_documents(machine, documents, about or about_in("swarm"))
    except LocalError:
        ledger.close()
        raise
    return ledger


def charge_file_alone(path: Path, *segments: Segment, about: ChargeContext | None = None) -> None:
    """Write charges as versions did that knew no register; `about` None: nor noted anything."""
    with Ledger.look(path) as ledger:
        chain = ChargeChain(ledger.id)
    database = sqlite3.connect(path)
    for values in database.execute("SELECT * FROM charges ORDER BY counter"):
        chain.add(Row(*values))
    with database:
        for segment in segments:
            row = chain.next_row(segment, about)
            chain.add(row)
            database.execute("INSERT INTO charges VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
            database.execute("UPDATE head SET counter = ?, hash = ?", (row.counter, row.hash))
    database.close()


def by_unit(*charged: Segment, unit: str = "record") -> ByUnit:
    """As a ledger tells them."""
    history: History = {}
    for each in charged:
        kind = each.noise_multiplier, each.sampling_probability
        history[kind] = history.get(kind, 0) + each.steps
    return {unit: history} if history else {}
