"""Whether a home has trained before: a fault of its text may then pass, and its choices stay."""

from __future__ import annotations

from xpeer.accounts.ledger import Ledger
from xpeer.config import Home


def has_trained(home: Home) -> bool:
    """Whether this home has taken steps.

    Raises:
        LocalError: its ledger is damaged.
    """
    if any(home.checkpoints.glob("ckpt-*.safetensors")):
        return True
    if not home.ledger_db.exists():
        return False
    with Ledger.look(home.ledger_db) as ledger:
        return ledger.counter > 0
