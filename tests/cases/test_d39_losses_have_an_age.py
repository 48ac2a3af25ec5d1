"""D39: every loss in status has its age, and no two numbers contradict one another."""

from __future__ import annotations

import re
from typing import Any

import pytest

from xpeer.cli import render
from xpeer.phase import Phase
from xpeer.status import Partner, PrivacySpent, Progress, Status


def progress(**fields: Any) -> Progress:
    """Without what an older version does not know."""
    return Progress(**{k: v for k, v in fields.items() if k in Progress.__struct_fields__})


def lines(**fields: Any) -> str:
    rows = "\n".join(render.status_lines(Status(state=Phase.TRAINING, **fields)))
    return re.sub(r"\n {12}(?! )", " ", rows)


def test_a_loss_of_long_ago_is_seen_to_be() -> None:
    told = lines(
        progress=progress(
            step=340, loss_public=2.41, loss_train=2.5, loss_validation=2.6,
            loss_measured_step=0, loss_measured_age_s=3725.0, loss_train_age_s=2.0,
        )
    )  # fmt: skip
    losses = next(line for line in told.splitlines() if line.startswith("loss"))
    assert re.search(r"public 2\.4100, 1h 2m ago at step 0", losses), f"no age: {losses}"
    assert "train 2.5000, 2s ago" in losses
    assert "validation 2.6000, 1h 2m ago at step 0" in losses


@pytest.mark.parametrize("spent", [7.981, 8.0, 8.001, 0.0])
def test_a_budget_that_has_no_step_left_has_nothing_left(spent: float) -> None:
    told = lines(
        privacy=PrivacySpent(epsilon_spent=spent, epsilon_target=8.0, steps_charged=9, steps_left=0)
    )
    (budget,) = [line for line in told.splitlines() if line.startswith("privacy")]
    assert not re.search(r"[1-9]\d* or 0 steps left", budget), budget
    assert "no steps left" in budget


def test_a_budget_with_steps_left_says_how_many() -> None:
    spent = PrivacySpent(epsilon_spent=3.0, epsilon_target=8.0, steps_charged=9, steps_left=7)
    assert "5.000 or 7 steps left" in lines(privacy=spent)


def test_live_partners_are_counted_as_the_reason_counts_them() -> None:
    partners = [Partner(peer_id=f"12D3KooW{n}", phase="joining") for n in range(2)]
    assert "2 live (2 joining)" in lines(partners=partners)


def test_what_nobody_knows_is_no_zero() -> None:
    told = lines(trainer_runs=False)
    assert not re.search(r"(step|epsilon|loss|learning rate) 0", told)
    assert "step - (nothing is known yet" in told
    assert "- tokens/s on -" in told
