"""The privacy card of exports."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tests.unit.accounts.ledgers import open_declared
from tests.unit.privacy.test_mechanism import OFF, manifest
from xpeer.accounts import accountant, model_card
from xpeer.accounts.accountant import Segment
from xpeer.accounts.ledger import Ledger


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    with open_declared(tmp_path / "ledger.sqlite") as made:
        made.charge(Segment(1.0, 0.02, 40))
    return Ledger.look(tmp_path / "ledger.sqlite")


def test_a_card_tells_epsilon_and_no_size(ledger: Ledger) -> None:
    made = model_card.card_of(manifest(), "swarm", 40, ledger)
    spent = accountant.epsilon([Segment(1.0, 0.02, 40)], 1e-5)
    assert made.epsilon_spent is not None
    assert spent <= made.epsilon_spent < spent + 0.5
    assert (made.unit, made.delta) == ("record", 1e-5)
    words, machine = (content.decode() for content in model_card.files(made).values())
    assert f"epsilon = {made.epsilon_spent:g}" in words
    assert msgspec.json.decode(machine, type=model_card.PrivacyCard) == made
    assert "0.02" not in words + machine


def test_a_card_without_privacy_says_so() -> None:
    made = model_card.card_of(OFF, "swarm", 1, None)
    assert (made.epsilon_spent, made.unit) == (None, None)
    assert "**None.**" in model_card.files(made)["README.md"].decode()


def test_a_node_that_never_trained() -> None:
    made = model_card.card_of(manifest(), "swarm", 1, None)
    assert made.epsilon_spent == 0.0
    assert "has trained on no text of its own" in model_card.files(made)["README.md"].decode()
