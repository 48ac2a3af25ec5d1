"""A part of epsilon is kept back from the swarm's run, and own steps spend what is left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.accounts.ledgers import about_in, open_declared
from xpeer.accounts import accountant, report
from xpeer.accounts.accountant import Segment
from xpeer.accounts.audit import markdown
from xpeer.accounts.budget import SIGMA_SETTING, Budget
from xpeer.accounts.ledger import Ledger
from xpeer.accounts.register import Register
from xpeer.accounts.spending import WHOLE, OwnSpending, Spending, SwarmSpending
from xpeer.drafting import draft_manifest
from xpeer.errors import BudgetSpentError
from xpeer.founding_model import initial_model
from xpeer.manifest import Manifest

EPSILON, DELTA, Q, STEPS = 8.0, 1e-5, 0.1, 40
QUARTER = SwarmSpending(0.25)


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    changes = [f"privacy.epsilon={EPSILON}", f"end.steps={STEPS}"]
    source = initial_model(None, None, "tiny", None)
    return draft_manifest("t", source, tokenizer=None, public_text=None, changes=changes)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with open_declared(tmp_path / "ledger.sqlite") as opened:
        yield opened


def reopened(path: Path, *, own: bool) -> Ledger:
    about = msgspec.structs.replace(about_in("swarm"), own=own)
    return open_declared(path / "ledger.sqlite", about=about)


def budget(manifest: Manifest, ledger: Ledger, spending: Spending) -> Budget:
    allowed = spending.allowance(manifest, ledger, DELTA, Q)
    return Budget(
        ledger,
        epsilon=EPSILON,
        delta=DELTA,
        noise_multiplier=allowed.noise_multiplier,
        sampling_probability=Q,
        bounds=allowed.bounds,
    )


def spend(manifest: Manifest, ledger: Ledger, spending: Spending, most: int = 10_000) -> int:
    """Charge all steps that may be taken; returns their number."""
    made = budget(manifest, ledger, spending)
    taken = made.begin(most)
    made.close()
    return taken


def epsilon(ledger: Ledger) -> float:
    return accountant.epsilon_worst(ledger.histories(), DELTA)


def test_the_run_leaves_what_is_kept_back_and_own_steps_spend_it(
    manifest: Manifest, tmp_path: Path
) -> None:
    with reopened(tmp_path, own=False) as ledger:
        assert spend(manifest, ledger, QUARTER) >= STEPS
        assert 0.98 * 6 < epsilon(ledger) <= 6
        assert ledger.own_segments() == []
    with reopened(tmp_path, own=True) as ledger:
        assert spend(manifest, ledger, OwnSpending(30, QUARTER)) >= 30
        assert 0.98 * EPSILON < epsilon(ledger) <= EPSILON
        (own,) = ledger.own_segments()
        assert own.steps >= 30
    with reopened(tmp_path, own=False) as ledger:
        assert spend(manifest, ledger, QUARTER) == 0
        assert spend(manifest, ledger, WHOLE) == 0  # the setting was taken back: nothing is left


def test_without_the_setting_a_run_spends_as_before(manifest: Manifest, ledger: Ledger) -> None:
    sigma = accountant.calibrate(EPSILON, DELTA, Q, STEPS)
    assert WHOLE.allowance(manifest, ledger, DELTA, Q).noise_multiplier == sigma
    fits = accountant.steps_within(EPSILON, DELTA, [], sigma, Q, 10_000)
    assert spend(manifest, ledger, WHOLE) == fits
    with pytest.raises(BudgetSpentError, match=r"set privacy\.keep_back"):
        OwnSpending(30, WHOLE).allowance(manifest, ledger, DELTA, Q)


def test_a_part_kept_back_later_ends_the_run_earlier(manifest: Manifest, ledger: Ledger) -> None:
    """The noise stays as it was calibrated, since it never changes."""
    sigma = WHOLE.allowance(manifest, ledger, DELTA, Q).noise_multiplier
    taken = spend(manifest, ledger, WHOLE, most=6)
    assert QUARTER.allowance(manifest, ledger, DELTA, Q).noise_multiplier == sigma
    taken += spend(manifest, ledger, QUARTER)
    assert 6 < taken < STEPS
    assert epsilon(ledger) <= 6
    assert spend(manifest, ledger, SwarmSpending(0.8)) == 0  # more was spent than it would leave


def test_own_steps_in_the_middle_of_a_run_leave_its_rest(
    manifest: Manifest, tmp_path: Path
) -> None:
    with reopened(tmp_path, own=False) as ledger:
        spend(manifest, ledger, QUARTER, most=16)
    with reopened(tmp_path, own=True) as ledger:
        spending = OwnSpending(30, QUARTER, swarm_steps=STEPS - 16)
        assert spend(manifest, ledger, spending) >= 30
        assert epsilon(ledger) < EPSILON
    with reopened(tmp_path, own=False) as ledger:
        assert spend(manifest, ledger, QUARTER) >= STEPS - 16
        assert 0.98 * EPSILON < epsilon(ledger) <= EPSILON


def test_own_steps_go_on_with_their_noise_and_are_not_refunded(
    manifest: Manifest, tmp_path: Path
) -> None:
    with reopened(tmp_path, own=False) as ledger:
        spend(manifest, ledger, QUARTER)
    with reopened(tmp_path, own=True) as ledger:
        sigma = OwnSpending(30, QUARTER).allowance(manifest, ledger, DELTA, Q).noise_multiplier
        fits = budget(manifest, ledger, OwnSpending(30, QUARTER)).left
        assert spend(manifest, ledger, OwnSpending(30, QUARTER), most=12) == 12
    with reopened(tmp_path, own=True) as ledger:
        again = OwnSpending(20, QUARTER, noise_multiplier=sigma)
        assert spend(manifest, ledger, again) == fits - 12
        anew = OwnSpending(30, QUARTER)
        with pytest.raises(
            BudgetSpentError, match=r"what privacy\.keep_back \(0\.25\) kept is spent"
        ):
            anew.allowance(manifest, ledger, DELTA, Q)


def test_begun_anew_own_steps_have_more_noise(manifest: Manifest, tmp_path: Path) -> None:
    with reopened(tmp_path, own=False) as ledger:
        spend(manifest, ledger, QUARTER)
    with reopened(tmp_path, own=True) as ledger:
        first = OwnSpending(30, QUARTER).allowance(manifest, ledger, DELTA, Q).noise_multiplier
        spend(manifest, ledger, OwnSpending(30, QUARTER), most=12)
        again = OwnSpending(30, QUARTER).allowance(manifest, ledger, DELTA, Q).noise_multiplier
        assert again > first
        spend(manifest, ledger, OwnSpending(30, QUARTER))
        assert epsilon(ledger) <= EPSILON


def test_another_home_with_the_same_documents_counts(manifest: Manifest, tmp_path: Path) -> None:
    """The swarm's run in one home, own steps in another: one account, one epsilon."""
    with reopened(tmp_path, own=False) as ledger:
        spend(manifest, ledger, QUARTER)
    other = tmp_path / "other"
    other.mkdir()
    with open_declared(
        other / "ledger.sqlite",
        register=tmp_path / "register",
        about=msgspec.structs.replace(about_in("swarm"), own=True),
    ) as ledger:
        assert spend(manifest, ledger, OwnSpending(30, QUARTER)) >= 30
        assert 0.98 * EPSILON < epsilon(ledger) <= EPSILON


def test_two_homes_at_once_leave_what_is_kept_back(manifest: Manifest, tmp_path: Path) -> None:
    """Each charge of one is a reason for the other to look at the limits again."""
    other = tmp_path / "other"
    other.mkdir()
    with (
        reopened(tmp_path, own=False) as first,
        open_declared(other / "ledger.sqlite", register=tmp_path / "register") as second,
    ):
        budgets = [budget(manifest, ledger, QUARTER) for ledger in (first, second)]
        taken = [0, 0]
        for _ in range(STEPS):
            for number, each in enumerate(budgets):
                more = each.begin(5)
                for _ in range(more):
                    each.use()
                taken[number] += more
        for each in budgets:
            each.close()
        assert min(taken) > 10
        assert sum(taken) >= STEPS
        assert epsilon(first) == epsilon(second) <= 6


def test_a_spent_document_refuses_own_steps(manifest: Manifest, tmp_path: Path) -> None:
    with reopened(tmp_path, own=False) as ledger:
        spend(manifest, ledger, WHOLE)
    other = tmp_path / "other"
    other.mkdir()
    path, documents = other / "ledger.sqlite", ("new", "a document")
    with (
        open_declared(path, documents, register=tmp_path / "register") as ledger,
        pytest.raises(BudgetSpentError),
    ):
        OwnSpending(30, WHOLE).allowance(manifest, ledger, DELTA, Q)
    with open_declared(path, documents[:1], register=tmp_path / "register") as ledger:
        assert OwnSpending(30, WHOLE).allowance(manifest, ledger, DELTA, Q).noise_multiplier > 0


def test_an_older_ledger_refunds_no_own_steps(manifest: Manifest, tmp_path: Path) -> None:
    with reopened(tmp_path, own=False) as ledger:
        spend(manifest, ledger, QUARTER)
    older = (tmp_path / "ledger.sqlite").read_bytes()
    with reopened(tmp_path, own=True) as ledger:
        spend(manifest, ledger, OwnSpending(30, QUARTER))
        before = epsilon(ledger)
    for name in ("ledger.sqlite-wal", "ledger.sqlite-shm"):
        (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / "ledger.sqlite").write_bytes(older)
    with reopened(tmp_path, own=True) as ledger:
        assert epsilon(ledger) == before
        assert ledger.own_segments() == []  # nobody knows: they count as the swarm's
        with pytest.raises(BudgetSpentError):
            OwnSpending(30, QUARTER).allowance(manifest, ledger, DELTA, Q)


def test_older_versions_read_a_ledger_without_own_steps(ledger: Ledger, tmp_path: Path) -> None:
    ledger.charge(Segment(1.0, Q, 3))
    rows = ledger._connection.execute("SELECT about FROM charges").fetchall()
    assert all("own" not in msgspec.json.decode(about) for (about,) in rows)
    with reopened(tmp_path, own=True) as opened:
        opened.charge(Segment(2.0, Q, 4))
    with Ledger.look(tmp_path / "ledger.sqlite") as looked:
        assert [bool(c.about and c.about.own) for c in looked.charges()] == [False, True]
        assert looked.own_segments() == [Segment(2.0, Q, 4)]


def test_the_report_tells_own_steps_apart(manifest: Manifest, tmp_path: Path) -> None:
    register: Any
    with reopened(tmp_path, own=False) as ledger:
        spend(manifest, ledger, QUARTER, most=STEPS)
    with (
        Ledger.look(tmp_path / "ledger.sqlite") as ledger,
        Register.look(tmp_path / "register") as register,  # type: ignore[union-attr]
    ):
        found = report.account(ledger, register, 0.25)
        assert found.epsilon_kept_back == 2
        whole = report.account(ledger, register).steps_left
        assert found.steps_left is not None
        assert whole is not None
        assert found.steps_left < whole
    with reopened(tmp_path, own=True) as ledger:
        spend(manifest, ledger, OwnSpending(30, QUARTER), most=7)
    with (
        Ledger.look(tmp_path / "ledger.sqlite") as ledger,
        Register.look(tmp_path / "register") as register,  # type: ignore[union-attr]
    ):
        found, verdict = report.account(ledger, register, 0.25), report.verify(ledger, register)
        assert sum(each.steps for each in found.own_segments) == 7
        assert sum(each.steps for each in found.segments) == STEPS + 7
        assert verdict.problems == []
        written = markdown(found, verdict, ledger.charges())
    assert "7 of the steps below are own steps" in written
    assert "| 7 | own model |" in written
    assert f"| {STEPS} | swarm |" in written


def test_the_run_s_noise_is_kept_in_the_ledger_and_that_of_own_steps_is_not(
    manifest: Manifest, ledger: Ledger
) -> None:
    OwnSpending(30, QUARTER, swarm_steps=STEPS).allowance(manifest, ledger, DELTA, Q)
    kept = accountant.calibrate(6.0, DELTA, Q, STEPS)
    assert ledger.settings(SIGMA_SETTING) == repr(kept)
