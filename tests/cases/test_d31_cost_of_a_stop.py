"""D31: a clean stop and start of a private run charged five steps a window and used one or two."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cases.support import Nodes, found
from xpeer.accounts.ledger import Ledger
from xpeer.config import Home


@pytest.mark.timeout(180)
def test_a_clean_stop_costs_no_epsilon(nodes: Nodes, shard: Path) -> None:
    """Twice; then the run's end: it was charged for its twenty steps, and cost their epsilon."""
    home = nodes.home("a")
    found(home, shard)
    for least in (2, 8):
        nodes.start("a")
        nodes.until("a", lambda s, n=least: s.progress.step >= n)  # type: ignore[misc]
        assert nodes.stop("a") == 0
        with Ledger.look(Home(home).ledger_db) as ledger:
            charged = ledger.steps_charged
        newest = max(path.name for path in (home / "checkpoints").glob("ckpt-*.safetensors"))
        assert charged == int(newest[5:-12]), "steps were charged and not used"
    nodes.start("a")
    status = nodes.until("a", lambda s: s.progress.step == 20 and s.privacy.steps_charged >= 20)
    assert status.privacy.steps_charged == 20
    assert status.privacy.epsilon_spent <= status.privacy.epsilon_target
    assert nodes.stop("a") == 0
