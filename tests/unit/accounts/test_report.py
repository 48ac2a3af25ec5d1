"""What the ledger tells its operator and auditors."""

from __future__ import annotations

import re
import sqlite3
from pathlib import Path

import pytest

from tests.unit.accounts.ledgers import about_in, charge_file_alone, open_declared
from xpeer.accounts import accountant, audit, planning, report
from xpeer.accounts.accountant import Segment
from xpeer.accounts.budget import coarse_size
from xpeer.accounts.ledger import Ledger
from xpeer.accounts.register import Register
from xpeer.errors import ConfigError, LocalError

ABOUT = about_in("swarm")


@pytest.fixture
def lost(tmp_path: Path) -> Path:
    """The register that `path` was charged with, which no report looks at."""
    return tmp_path / "lost register"


@pytest.fixture
def path(tmp_path: Path, lost: Path) -> Path:
    found = tmp_path / "ledger.sqlite"
    with open_declared(found, register=lost) as ledger:
        ledger.charge(Segment(1.0, 0.02, 40))
        ledger.charge(Segment(1.2, 0.01, 60))
    return found


def test_the_account_follows_from_the_file_alone(path: Path) -> None:
    with Ledger.look(path) as ledger:
        found = report.account(ledger)
    assert (found.mode, found.swarm_id, found.clip_norm) == ("record", "swarm", 1.0)
    assert found.steps_charged == 100
    assert found.epsilon_spent == accountant.epsilon(found.segments, 1e-5)
    assert found.steps_left is not None
    more = [*found.segments, Segment(1.2, 0.01, found.steps_left)]
    assert accountant.epsilon(more, 1e-5) <= 8.0
    assert accountant.epsilon([*more, Segment(1.2, 0.01, 1)], 1e-5) > 8.0


def test_a_ledger_is_looked_at_while_it_is_charged(path: Path, lost: Path) -> None:
    with open_declared(path, register=lost) as writer, Ledger.look(path) as before:
        writer.charge(Segment(1.0, 0.02, 5))
        with Ledger.look(path) as after:
            assert (before.steps_charged, after.steps_charged) == (100, 105)
        with pytest.raises(LocalError, match="is closed"):
            before.charge(Segment(1.0, 0.02, 5))


def test_verified(path: Path) -> None:
    with Ledger.look(path) as ledger:
        verdict = report.verify(ledger)
        assert verdict.problems == []
        (found,) = verdict.checked
        assert found.epsilon_accountant == pytest.approx(found.epsilon_replayed, rel=0.01)
        assert found.epsilon_lower < found.epsilon_accountant < found.epsilon_rdp
        assert found.epsilon_lower < found.epsilon_replayed < found.epsilon_upper
        assert verdict.steps_registered is None
        text = audit.markdown(report.account(ledger), verdict, ledger.charges())
    assert "| 1.0 | 0.02 | 40 |" in text
    assert f"last link of their chain `{ledger.head}`" in text


def test_a_wrong_accountant_is_found_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = accountant.epsilon
    monkeypatch.setattr(accountant, "epsilon", lambda *given: 0.9 * right(*given))
    with Ledger.look(path) as ledger:
        assert report.verify(ledger).problems


def test_a_charge_that_was_altered_is_found_out(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE charges SET about = replace(about, '8.0', '80.0')")
    connection.close()
    with pytest.raises(LocalError, match="inconsistent at charge 1"):
        Ledger.look(path)


def test_a_ledger_of_the_first_version_goes_on(tmp_path: Path) -> None:
    """As written before charges noted what they were for."""
    path = tmp_path / "ledger.sqlite"
    Ledger.open(path).close()
    charge_file_alone(path, Segment(1.0, 0.02, 7))
    with sqlite3.connect(path) as connection:
        connection.executescript(
            "ALTER TABLE charges DROP COLUMN about; UPDATE head SET version = 1;"
        )
    connection.close()
    with Ledger.look(path) as old:
        assert old.segments() == [Segment(1.0, 0.02, 7)]
    with open_declared(path) as ledger:
        ledger.charge(Segment(1.0, 0.02, 3))
    with Ledger.look(path) as again:
        assert [c.about is None for c in again.charges()] == [True, False]
        assert again.segments() == [Segment(1.0, 0.02, 10)]


def test_the_end_is_forecast_from_the_last_hour(path: Path, lost: Path) -> None:
    with open_declared(path, register=lost) as ledger:
        ledger.charge(Segment(1.2, 0.01, 60))
        times = [charge.about.unix_s for charge in ledger.charges() if charge.about]
        assert len(times) == 3
        pace = 120 / (times[-1] - times[0])
        soon, late = times[-1] + 5.0, times[-1] + 1e5
        assert ledger.ends_unix_s(1000, lambda: soon) == pytest.approx(soon + 1000 / pace)
        assert ledger.ends_unix_s(1000, lambda: late) is None
        assert ledger.ends_unix_s(1000, lambda: times[-1] + 61.0) is None  # it has stopped


def test_a_plan_spends_the_budget_and_no_more() -> None:
    found = planning.plan(epsilon=3.0, records=5000, batch=100, steps=200, sequence_tokens=64)
    assert found.delta == accountant.default_delta(coarse_size(5000))
    assert found.curve[-1][0] == 200
    assert 2.97 < found.curve[-1][1] <= 3.0
    assert [eps for _, eps in found.curve] == sorted(eps for _, eps in found.curve)
    assert (found.passes, found.tokens_per_step) == (4.0, 6400)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"records": 0}, "--records 0"),
        ({"batch": 101}, "--batch 101"),
        ({"steps": 0}, "--steps 0"),
        ({"epsilon": float("nan")}, "--epsilon nan"),
        ({"delta": 1.0}, "--delta 1.0"),
    ],
)
def test_a_plan_names_what_is_wrong(wrong: dict[str, float], named: str) -> None:
    given = {"epsilon": 3.0, "records": 100, "batch": 10, "steps": 5} | wrong
    with pytest.raises(ConfigError, match=re.escape(named)):
        planning.plan(**given)  # type: ignore[arg-type]


def test_documents_of_the_shard_count_with_what_other_homes_charged(
    path: Path, tmp_path: Path
) -> None:
    with open_declared(path, ["x", "y", "gone"]) as ledger:
        own = ledger.segments()
    open_declared(path, ["x", "y"]).close()
    with open_declared(tmp_path / "other.sqlite", ["x"], about=about_in("other")) as other:
        other.charge(Segment(0.9, 0.03, 50))
    register = Register.look(tmp_path / "register")
    assert register is not None
    with Ledger.look(path) as ledger, register:
        found, verdict = report.account(ledger, register), report.verify(ledger, register)
        text = audit.markdown(found, verdict, ledger.charges())
    worst = accountant.epsilon([*own, Segment(0.9, 0.03, 50)], 1e-5)
    assert found.epsilon_spent == verdict.epsilon_spent == pytest.approx(worst)
    told = [(each.documents, each.here, each.homes) for each in found.documents]
    assert told == [(1, True, 2), (1, True, 1), (1, False, 1)]
    assert found.documents[0].swarms == ["other", "swarm"]
    assert verdict.problems == []
    assert [each.what for each in verdict.checked] == [
        "this ledger", "documents of the shard, all homes",
    ]  # fmt: skip
    assert "| 1 | no longer | 1 |" in text


def test_a_register_that_lacks_charges_is_found_out(path: Path, tmp_path: Path) -> None:
    open_declared(path, ["x"]).close()
    charge_file_alone(path, Segment(1.0, 0.02, 3), about=ABOUT)
    register = Register.look(tmp_path / "register")
    assert register is not None
    with Ledger.look(path) as ledger, register:
        verdict = report.verify(ledger, register)
    assert verdict.steps_registered == 100
    assert any("lacks 3 of this ledger's 103 steps" in problem for problem in verdict.problems)


def test_an_accountant_that_says_too_little_is_found_out_even_if_it_is_close(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = accountant.epsilon
    monkeypatch.setattr(accountant, "epsilon", lambda *given: right(*given) - 0.006)
    with Ledger.look(path) as ledger:
        (problem,) = report.verify(ledger).problems
    assert "is at least" in problem
