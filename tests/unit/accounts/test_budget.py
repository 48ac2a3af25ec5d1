from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.unit.accounts.ledgers import ROOT, open_declared
from xpeer.accounts.accountant import Segment, epsilon
from xpeer.accounts.budget import Budget
from xpeer.accounts.ledger import Ledger
from xpeer.errors import ConfigError, LocalError

TARGET, DELTA, SIGMA = 8.6, 1e-5, 4.0
FITS = 50
"""Steps with q = 1 (the accountant's reference table: 50 steps cost 8.5959)."""


def budget(ledger: Ledger, **more: Any) -> Budget:
    fields: dict[str, Any] = {
        "epsilon": TARGET,
        "delta": DELTA,
        "noise_multiplier": SIGMA,
        "sampling_probability": 1.0,
    }
    return Budget(ledger, **(fields | more))


def test_charges_before_use_and_never_more_than_fits(tmp_path: Path) -> None:
    with open_declared(tmp_path / "ledger.sqlite") as ledger:
        made = budget(ledger)
        assert made.left == FITS
        with pytest.raises(LocalError, match="none is charged"):
            made.use()
        assert made.begin(20) == 20
        assert (ledger.steps_charged, made.left) == (20, 30)
        for _ in range(20):
            made.use()
        with pytest.raises(LocalError, match="none is charged"):
            made.use()
        assert made.begin(20) == 20
        assert made.begin(20) == 20  # nothing was used
        assert ledger.steps_charged == 40
        for _ in range(20):
            made.use()
        assert made.begin(20) == 10  # the budget ends
        for _ in range(10):
            made.use()
        assert made.begin(20) == 0
        assert (ledger.steps_charged, ledger.counter) == (FITS, 3)
        assert epsilon(ledger.segments(), DELTA) <= TARGET
        assert not made.overdrawn
        made.close()


def test_prepared_charges_are_collected(tmp_path: Path) -> None:
    with open_declared(tmp_path / "ledger.sqlite") as ledger:
        made = budget(ledger)
        assert made.begin(4) == 4
        made.use()
        made.prepare(6)
        made.prepare(6)  # one at a time
        assert made.begin(0) == 9
        assert ledger.steps_charged == 10
        made.prepare(100)
        assert made.begin(100) == 49
        assert made.left == 0
        made.prepare(5)
        assert made.begin(100) == 49
        made.close()


def test_steps_go_on_while_a_charge_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_declared(tmp_path / "ledger.sqlite") as ledger:
        made = budget(ledger)
        made.begin(2)
        written, inner = threading.Event(), ledger.charge

        def slow(segment: Segment, fits: Any) -> int:
            written.wait(10)
            return inner(segment, fits)

        monkeypatch.setattr(ledger, "charge", slow)
        made.prepare(3)
        made.use()
        made.use()
        with pytest.raises(LocalError, match="none is charged"):
            made.use()  # what is not on the disk does not count
        written.set()
        assert made.begin(3) == 3
        made.close()


def test_a_charge_that_can_not_be_written_permits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_declared(tmp_path / "ledger.sqlite") as ledger:
        made = budget(ledger)

        def full(segment: Segment, fits: Any) -> int:
            raise LocalError("disk full")

        monkeypatch.setattr(ledger, "charge", full)
        with pytest.raises(LocalError, match="disk full"):
            made.begin(3)
        made.prepare(3)
        with pytest.raises(LocalError, match="disk full"):
            made.begin(3)
        with pytest.raises(LocalError, match="none is charged"):
            made.use()
        made.close()


def test_without_declared_documents_no_step_is_permitted(tmp_path: Path) -> None:
    with Ledger.open(tmp_path / "ledger.sqlite") as ledger:
        made = budget(ledger)
        with pytest.raises(LocalError, match="documents were declared"):
            made.begin(3)
        made.prepare(3)
        with pytest.raises(LocalError, match="documents were declared"):
            made.begin(3)
        with pytest.raises(LocalError, match="none is charged"):
            made.use()
        assert ledger.counter == 0
        made.close()


def test_other_kinds_of_steps_count(tmp_path: Path) -> None:
    with open_declared(tmp_path / "ledger.sqlite") as ledger:
        first = budget(ledger)
        first.begin(25)
        first.close()
        second = budget(ledger, sampling_probability=0.5, noise_multiplier=3.0)
        fits = second.left
        assert fits > 25  # smaller q, more steps
        assert second.begin(10_000) == fits
        spent = ledger.segments()
        assert epsilon(spent, DELTA) <= TARGET
        assert epsilon([*spent, Segment(3.0, 0.5, 1)], DELTA) > TARGET
        second.close()
        third = budget(ledger)
        assert third.begin(1) == 0
        third.close()


CRASH = """
import os, signal, sys
from pathlib import Path
from xpeer.accounts.budget import Budget
from tests.unit.accounts.ledgers import open_declared
ledger = open_declared(Path(sys.argv[1]))
budget = Budget(
    ledger, epsilon=8.6, delta=1e-5, noise_multiplier=4.0, sampling_probability=1.0
)
budget.begin(20)
for _ in range(3):
    budget.use()
if sys.argv[2] == "prepare":
    budget.prepare(10)
    budget._prepared.result()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("how", "charged"), [("window", 20), ("prepare", 30)])
def test_a_killed_process_is_refunded_nothing(tmp_path: Path, how: str, charged: int) -> None:
    path = tmp_path / "ledger.sqlite"
    command = [sys.executable, "-c", CRASH, str(path), how]
    done = subprocess.run(command, cwd=ROOT, check=False, timeout=50)
    assert done.returncode == -signal.SIGKILL
    with open_declared(path) as ledger:
        assert ledger.steps_charged == charged
        made = budget(ledger)
        assert made.left == FITS - charged
        with pytest.raises(LocalError, match="none is charged"):
            made.use()
        made.close()


def test_negative_steps_are_a_mistake(tmp_path: Path) -> None:
    with open_declared(tmp_path / "ledger.sqlite") as ledger:
        made = budget(ledger)
        with pytest.raises(ValueError, match="-1"):
            made.begin(-1)
        with pytest.raises(ValueError, match="-1"):
            made.prepare(-1)
        made.close()


def test_homes_with_common_documents_never_spend_more_than_one_budget(tmp_path: Path) -> None:
    """Each has a whole budget before it when it starts; only together they reach its end."""
    ledgers = [open_declared(tmp_path / f"{name}.sqlite", ["x", name]) for name in "ab"]
    budgets = [budget(ledger) for ledger in ledgers]
    assert [made.left for made in budgets] == [FITS, FITS]
    used = [0, 0]
    for _ in range(10):
        for number, made in enumerate(budgets):
            if made.begin(7):
                made.use()
                used[number] += 1
            for _ in range(made.begin(0)):
                made.use()
                used[number] += 1
    assert sum(used) == FITS == sum(ledger.steps_charged for ledger in ledgers)
    assert used[0] == 28 or used[1] == 28
    for made, ledger in zip(budgets, ledgers, strict=True):
        assert max(epsilon(history, DELTA) for history in ledger.histories()) <= TARGET
        assert made.left == 0
        assert not made.overdrawn
        made.close()
        ledger.close()


def test_documents_without_a_past_have_a_whole_budget(tmp_path: Path) -> None:
    for documents, left in ((["x"], FITS), (["y"], FITS), (["x", "y"], FITS - 30)):
        with open_declared(tmp_path / "ledger.sqlite", documents) as ledger:
            made = budget(ledger)
            assert made.left == left
            if len(documents) == 1:
                made.begin(30 if documents == ["x"] else 20)
            made.close()


def test_noise_with_which_no_step_fits_is_an_error_of_the_founder(tmp_path: Path) -> None:
    wrong = pytest.raises(ConfigError, match=r"privacy\.noise_multiplier 0\.01: a single step")
    with open_declared(tmp_path / "ledger.sqlite") as ledger, wrong:
        Budget(ledger, epsilon=8, delta=1e-5, noise_multiplier=0.01, sampling_probability=0.5)


def test_a_smaller_shard_with_an_older_sigma_is_a_spent_budget(tmp_path: Path) -> None:
    """Sigma was calibrated for more text: nobody's mistake, and the node mixes on."""
    with open_declared(tmp_path / "ledger.sqlite", ["x"]) as ledger:
        ledger.charge(Segment(0.6, 0.001, 10))
    with open_declared(tmp_path / "ledger.sqlite", ["y"]) as ledger:
        made = Budget(ledger, epsilon=1, delta=1e-5, noise_multiplier=0.6, sampling_probability=0.9)
        assert made.left == 0
        made.close()
