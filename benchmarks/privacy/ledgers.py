"""Ledgers of runs: each is alone on its machine, so that no run is charged for another's steps."""

from __future__ import annotations

from pathlib import Path

from xpeer.accounts.chain import ChargeContext
from xpeer.accounts.ledger import Ledger
from xpeer.accounts.register import Register
from xpeer.manifest import Manifest


def open_ledger(folder: Path, manifest: Manifest) -> Ledger:
    """Open a ledger that can be charged, in a folder of its own; the register lies beside it.

    Args:
        folder: of this ledger alone; made if need be.
        manifest: of the run.
    """
    folder.mkdir(exist_ok=True)
    rules = manifest.privacy
    about = ChargeContext(
        manifest.name, rules.mode, rules.clip_norm, rules.delta or 0.0, rules.epsilon
    )
    ledger = Ledger.open(folder / "ledger.sqlite")
    ledger.declare_documents(Register.open(folder / "register"), ["shard"], about)
    return ledger
