"""`xpeer privacy` on ledgers."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from tests.unit.cli.test_init import xpeer
from xpeer.config import Home
from xpeer.errors import ExitCode
from xpeer.privacy.accountant import Segment, epsilon
from xpeer.privacy.ledger import About, Ledger


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "home").mkdir()
    with Ledger.open(Home(tmp_path / "home").ledger_db) as ledger:
        ledger.about = About("swarm", "record", 1.0, 1e-5, 8.0)
        ledger.charge(Segment(1.0, 0.02, 40))
    return tmp_path / "home"


def test_status_report_and_verify_tell_the_same(home: Path) -> None:
    spent = epsilon([Segment(1.0, 0.02, 40)], 1e-5)
    answers = []
    for command in ("status", "report", "verify"):
        code, out, err = xpeer("privacy", command, "--home", str(home), "--json")
        assert code == ExitCode.OK, err
        answers.append(json.loads(out))
    status, report, verdict = answers
    assert status["epsilon_spent"] == report["account"]["epsilon_spent"] == spent
    assert verdict["epsilon_accountant"] == spent
    assert verdict["problems"] == []
    assert report["charges"][0]["segment"]["steps"] == 40


def test_for_people(home: Path) -> None:
    code, out, err = xpeer("privacy", "status", "--home", str(home))
    assert code == ExitCode.OK
    assert "of 8 at delta 1e-05" in out
    assert "not covered" in err
    code, out, _ = xpeer("privacy", "report", "--home", str(home))
    assert code == ExitCode.OK
    assert out.startswith("# Privacy report")
    code, out, _ = xpeer("privacy", "verify", "--home", str(home))
    assert code == ExitCode.OK
    assert "an unbroken chain" in out


def test_damage_and_absence_are_told(home: Path, tmp_path: Path) -> None:
    code, _, err = xpeer("privacy", "status", "--home", str(tmp_path / "empty"))
    assert code == ExitCode.ERROR
    assert "there is no privacy ledger" in err
    with sqlite3.connect(Home(home).ledger_db) as connection:
        connection.execute("UPDATE charges SET steps = 4, total_steps = 4")
    connection.close()
    code, _, err = xpeer("privacy", "verify", "--home", str(home))
    assert code == ExitCode.ERROR
    assert "inconsistent at charge 1" in err


def test_plan(tmp_path: Path) -> None:
    code, out, err = xpeer(
        "privacy", "plan", "--epsilon", "4", "--records", "2000", "--batch", "50",
        "--rounds", "20",
    )  # fmt: skip
    assert code == ExitCode.OK, err
    assert "--set end.steps=100" in out
    sigma = float(out.partition("noise_multiplier=")[2].split()[0])
    assert 3.9 < epsilon([Segment(sigma, 0.025, 100)], 1e-5) <= 4.0
    code, out, _ = xpeer(
        "privacy", "plan", "--records", "2000", "--steps", "50", "--json"
    )  # fmt: skip
    assert [each["batch"] for each in json.loads(out)] == [32, 128, 512]
    code, _, err = xpeer("privacy", "plan", "--records", "2000")
    assert code == ExitCode.BAD_CONFIG
    assert "--steps and --rounds" in err
