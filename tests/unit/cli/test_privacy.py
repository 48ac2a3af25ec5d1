"""`xpeer privacy` on ledgers."""

from __future__ import annotations

import json
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from tests.unit.accounts.ledgers import about_in, open_declared
from tests.unit.cli.test_init import xpeer
from tests.unit.training.homes import make_homes
from xpeer.accounts.accountant import Segment, epsilon
from xpeer.config import Home
from xpeer.errors import ExitCode


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home that was charged by a version that noted no register, in another one than now."""
    (tmp_path / "home").mkdir()
    with open_declared(Home(tmp_path / "home").ledger_db) as ledger:
        ledger.charge(Segment(1.0, 0.02, 40))
    with closing(sqlite3.connect(ledger.path)) as database, database:
        database.execute("DELETE FROM settings")
    return tmp_path / "home"


@pytest.fixture
def bound(tmp_path: Path, register_of_the_test: Path) -> Path:
    """A home that notes the register of this machine."""
    (tmp_path / "bound").mkdir(mode=0o700)
    ledger_db = Home(tmp_path / "bound").ledger_db
    with open_declared(ledger_db, register=register_of_the_test) as ledger:
        ledger.charge(Segment(1.0, 0.02, 40))
    return tmp_path / "bound"


def test_status_report_and_verify_tell_the_same(home: Path) -> None:
    spent = epsilon([Segment(1.0, 0.02, 40)], 1e-5)
    answers = []
    for command in ("status", "report", "verify"):
        code, out, err = xpeer("privacy", command, "--home", str(home), "--json")
        assert code == ExitCode.OK, err
        answers.append(json.loads(out))
    status, report, verdict = answers
    assert status["epsilon_spent"] == report["account"]["epsilon_spent"] == spent
    assert verdict["epsilon_spent"] == verdict["checked"][0]["epsilon_accountant"] == spent
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


def test_plan_counts_a_shard(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"{number} words and more words. " * 20)
    plans = []
    for more in ((), ("--documents",)):
        code, out, err = xpeer(
            "privacy", "plan", "--shard", str(tmp_path), "--steps", "20", "--batch", "8",
            "--sequence-tokens", "64", "--parameters", "1000000", *more, "--json",
        )  # fmt: skip
        assert code == ExitCode.OK, err
        plans.append(json.loads(out)[0])
    by_record, by_document = plans
    assert by_document["unit"] == "document"
    assert 30 <= by_document["records"] < 40 < by_record["records"]
    assert by_record["noise_multiplier"] < by_document["noise_multiplier"]
    assert by_record["tokens_per_step"] == 8 * 64
    assert by_record["noise_norm"] == pytest.approx(by_record["noise_multiplier"] / 8 * 1000)
    code, _, err = xpeer("privacy", "plan", "--steps", "20")
    assert code == ExitCode.BAD_CONFIG
    assert "--records and --shard" in err


def test_other_homes_of_the_machine_count(home: Path, register_of_the_test: Path) -> None:
    register, other_swarm = register_of_the_test, about_in("other swarm")
    open_declared(Home(home).ledger_db, ["x", "y"], register=register).close()
    another = home / "another.sqlite"
    with open_declared(another, ["y"], register=register, about=other_swarm) as other:
        other.charge(Segment(1.0, 0.03, 40))
    code, out, err = xpeer("privacy", "status", "--home", str(home), "--json")
    assert code == ExitCode.OK, err
    both = epsilon([Segment(1.0, 0.02, 40), Segment(1.0, 0.03, 40)], 1e-5)
    assert json.loads(out)["epsilon_spent"] == pytest.approx(both)
    code, out, _ = xpeer("privacy", "status", "--home", str(home))
    assert "1 in the shard: epsilon" in out
    assert "by 2 homes" in out
    code, out, err = xpeer("privacy", "verify", "--home", str(home))
    assert code == ExitCode.OK, err
    assert "documents of the shard, all homes" in out


def test_which_files_were_charged(home: Path, register_of_the_test: Path) -> None:
    from tests.in_memory import load_documents

    shard = home.parent / "shard"
    shard.mkdir()
    (shard / "a.txt").write_text("a text that another home has, too")
    (shard / "b.txt").write_text("a text of this home")
    (shard / "c.txt").write_text("a new text")
    (home / "config.toml").write_text(f"[data]\nshard = [{str(shard)!r}]\n")
    ids = [document.id for document in load_documents([str(shard)])]
    register, other_swarm = register_of_the_test, about_in("other swarm")
    open_declared(Home(home).ledger_db, ids[:2], register=register).close()
    another = home / "another.sqlite"
    with open_declared(another, ids[:1], register=register, about=other_swarm) as other:
        other.charge(Segment(1.0, 0.03, 40))
    code, out, err = xpeer("privacy", "documents", "--home", str(home), "--json")
    assert code == ExitCode.OK, err
    found = {Path(each["path"]).name: each["epsilon"] for each in json.loads(out)}
    own, both = [Segment(1.0, 0.02, 40)], [Segment(1.0, 0.02, 40), Segment(1.0, 0.03, 40)]
    assert found == pytest.approx({"a.txt": epsilon(both, 1e-5), "b.txt": epsilon(own, 1e-5)})
    code, out, _ = xpeer(
        "privacy", "documents", "--home", str(home), "--above", str(found["b.txt"])
    )
    assert code == ExitCode.OK
    assert len(out.splitlines()) == 1
    assert out.rstrip().endswith("a.txt")
    named = ["--shard", str(shard / "a.txt"), "--json"]
    _, out, _ = xpeer("privacy", "documents", "--home", str(home), *named)
    assert [each["path"] for each in json.loads(out)] == [str(shard / "a.txt")]


@pytest.mark.parametrize("command", ["status", "verify", "report", "documents"])
def test_why_there_is_nothing_to_tell(tmp_path: Path, home: Path, command: str) -> None:
    without = Path(make_homes(tmp_path, 1, privacy="off")[0].home)
    code, _, err = xpeer("privacy", command, "--home", str(without))
    assert (code, "trains without privacy" in err) == (ExitCode.ERROR, True)
    Home(home).checkpoints.mkdir()
    (Home(home).checkpoints / "step-1").touch()
    Home(home).ledger_db.unlink()
    code, _, err = xpeer("privacy", command, "--home", str(home))
    assert (code, "is missing, but there are checkpoints" in err) == (ExitCode.ERROR, True)
    assert "restore it" in err


def test_what_is_not_covered_follows_from_the_unit(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, err = xpeer("privacy", "status", "--home", str(home))
    assert "m times epsilon" in err
    assert "register is not in" in err
    by_document = msgspec.structs.replace(about_in("swarm"), unit="document")
    with open_declared(Home(home).ledger_db, ["another"], about=by_document) as ledger:
        ledger.charge(Segment(1.0, 0.02, 1))
    monkeypatch.setenv("XPEER_PRIVACY_REGISTER", str(home / "register"))
    _, _, err = xpeer("privacy", "status", "--home", str(home))
    assert "m times epsilon" not in err
    assert "in several documents" in err


@pytest.mark.parametrize("command", ["status", "report", "verify", "documents"])
def test_a_report_goes_by_the_homes_register_or_names_it(
    tmp_path: Path,
    bound: Path,
    command: str,
    register_of_the_test: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "time", lambda: 1.8e9)  # reports say when they were made
    asked = ["privacy", command, "--home", str(bound)]
    wanted = xpeer(*asked)
    monkeypatch.setenv("XPEER_PRIVACY_REGISTER", str(tmp_path / "other"))
    assert xpeer(*asked) == wanted
    register_of_the_test.rename(tmp_path / "away")
    code, _, err = xpeer("privacy", command, "--home", str(bound))
    assert (code, "is not this home's register" in err) == (ExitCode.BAD_CONFIG, True)
    assert "XPEER_PRIVACY_REGISTER" in err
    assert not (tmp_path / "other").exists()


def test_an_auditors_copy_of_a_ledger_is_checked_without_its_register(
    tmp_path: Path, bound: Path, register_of_the_test: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XPEER_PRIVACY_REGISTER", str(tmp_path / "other"))
    register_of_the_test.rename(tmp_path / "elsewhere")
    copy = shutil.copy2(Home(bound).ledger_db, tmp_path / "copy.sqlite")
    code, _, err = xpeer("privacy", "verify", "--ledger", str(copy), "--home", str(bound))
    assert code == ExitCode.OK, err
    assert "register is not in" in err


def test_a_register_that_is_lost_for_good_is_given_up_by_name(
    tmp_path: Path, bound: Path, register_of_the_test: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XPEER_PRIVACY_REGISTER", str(tmp_path / "other"))
    code, _, err = xpeer("privacy", "use-register", "--home", str(bound))
    assert code == ExitCode.OK, err
    assert str(register_of_the_test) in err
    assert not (tmp_path / "other").exists()
    code, _, err = xpeer("privacy", "status", "--home", str(bound))
    assert code == ExitCode.OK, err
    code, _, err = xpeer("privacy", "use-register", "--home", str(tmp_path / "empty"))
    assert (code, "there is no privacy ledger" in err) == (ExitCode.ERROR, True)
    assert not (tmp_path / "empty").exists()
