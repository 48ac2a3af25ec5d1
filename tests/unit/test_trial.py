"""The trial before a manifest is signed: every kind of run goes through it, and nothing is left."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from tests.cases.support import model_folder, tokenizer_folder, write_shard
from tests.unit.accounts.ledgers import open_declared
from tests.unit.training.loops import manifest_with
from xpeer import dry_run
from xpeer.accounts.accountant import Segment
from xpeer.cli import main
from xpeer.config import Home, NodeConfig, Training
from xpeer.errors import ExitCode, LocalError
from xpeer.estimate import room
from xpeer.estimate.room import Room
from xpeer.manifest import End
from xpeer.manifest.privacy import Privacy
from xpeer.training.document import HexIds
from xpeer.training.model import FlatParameters

SMALL = ["--set", "optimiser.batch_records=4", "--set", "optimiser.sequence_tokens=32"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def init(home: Path, *options: str | Path) -> tuple[int, str]:
    done = CliRunner().invoke(
        main, ["init", "--swarm", "s", "--home", str(home), *SMALL, *map(str, options)]
    )
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stderr


KINDS: dict[str, list[str]] = {
    "private": [],
    "documents": ["--set", "privacy.unit=document"],
    "adaptive": ["--set", "privacy.clipping=adaptive"],
    "off": ["--privacy", "off"],
    "masks": ["--set", "round.masks=true", "--set", "round.group=3"],
    "gradient": ["--privacy", "off", "--set", "round.rule=gradient", "--set", "round.fragments=1",
                 "--set", "round.group=0"],
    "diloco": ["--set", "round.rule=diloco", "--set", "round.group=0"],
    "noloco": ["--set", "round.rule=noloco", "--set", "round.codec=bfloat16"],
    "gasloc": ["--set", "round.rule=gasloc", "--set", "round.codec=int4"],
    "trimmed mean": ["--set", "round.combiner=trimmed-mean", "--set", "round.group=5",
                     "--set", "round.trim=2"],
    "adapters": ["--lora-rank", "2"],
    "adapters, B alone": ["--lora-rank", "2", "--lora-train", "B"],
    "one step a window": ["--set", "round.window_steps=1", "--set", "end.steps=1"],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run(tmp_path: Path, register_of_the_test: Path, kind: str) -> None:
    code, err = init(tmp_path / "h", "--preset", "tiny", *KINDS[kind])
    assert code == 0, err
    for part in ("building the model", "step on public text", "exchange with itself", "exported"):
        assert part in err
    home = Home(tmp_path / "h")
    assert not register_of_the_test.exists(), "nothing is charged"
    assert not home.ledger_db.exists()
    assert not home.checkpoints.exists()
    assert {p.name for p in tmp_path.iterdir()} == {"h"}
    assert not [p for p in home.path.iterdir() if "trial" in p.name]


def test_a_model_with_its_tokenizer(tmp_path: Path) -> None:
    model = tokenizer_folder(model_folder(tmp_path / "m"))
    code, err = init(tmp_path / "h", "--model", model)
    assert (code, "exported, and loaded again" in err) == (0, True), err


def test_a_fault_that_only_a_restart_would_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xpeer import trial
    from xpeer.training.initial import trained_model

    def another(*_args: object, **_kwargs: object) -> torch.nn.Module:
        made = trained_model(*_args, **_kwargs)  # type: ignore[arg-type]
        with torch.no_grad():
            for module in made.modules():
                if isinstance(module, torch.nn.Linear):
                    module.register_forward_hook(lambda _m, _i, out: 1.1 * out)
        return made

    monkeypatch.setattr(trial, "trained_model", another)
    code, err = init(tmp_path / "h", "--preset", "tiny")
    assert code == 1, err
    assert "as restarted is not the one that was trained" in err
    assert not list(tmp_path.iterdir())


def test_a_failing_step_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_self: FlatParameters, _out: object = None) -> torch.Tensor:
        raise LocalError("no memory", "use less")

    monkeypatch.setattr(FlatParameters, "read", fail)
    code, err = init(tmp_path / "h", "--preset", "tiny")
    assert (code, "no memory" in err) == (1, True), err
    assert not list(tmp_path.iterdir())


def test_the_trial_can_be_skipped(tmp_path: Path) -> None:
    code, err = init(tmp_path / "h", "--preset", "tiny", "--skip-trial")
    assert (code, "step on public text" in err) == (0, False), err


def test_a_dry_run_says_what_a_run_takes(tmp_path: Path, register_of_the_test: Path) -> None:
    shard = write_shard(tmp_path / "shard", 20)
    code, err = init(tmp_path / "h", "--preset", "tiny", "--skip-trial", "--shard", shard,
                     "--listen", "/ip4/127.0.0.1/tcp/0", "--set", "end.steps=50")  # fmt: skip
    assert code == 0, err
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    done = CliRunner().invoke(main, ["start", "--home", str(tmp_path / "h"), "--dry-run"])
    assert done.exit_code == 0, done.stderr
    for part in ("documents to train on", "records of at most 32 tokens", "held out", "noise",
                 "epsilon 7.9", "at the end", "tokens/s", "memory", "planned steps: 50",
                 "all is well"):  # fmt: skip
        assert part in done.stderr, done.stderr
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    assert not register_of_the_test.exists()


def test_what_can_not_fit_warns_a_founder_and_ends_a_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "host", lambda: Room("memory of this machine", 10**6, 10**6))
    shard = write_shard(tmp_path / "shard", 20)
    with monkeypatch.context() as founding:
        founding.setenv("XPEER_TRAINING_CHECK_FIT", "warn")
        code, err = init(tmp_path / "h", "--preset", "tiny", "--shard", shard,
                         "--listen", "/ip4/127.0.0.1/tcp/0", "--set", "end.steps=50")  # fmt: skip
    assert code == 0, err
    for part in (
        "a node of this swarm needs",
        "a node on this machine could not start",
        "no step is tried",
    ):
        assert part in err
    assert "step on public text" not in err
    with monkeypatch.context() as unread:
        unread.setattr(dry_run, "_counted", lambda *_: pytest.fail("the text was counted first"))
        done = CliRunner().invoke(main, ["start", "--home", str(tmp_path / "h"), "--dry-run"])
    assert done.exit_code == ExitCode.BAD_CONFIG
    assert "memory of this machine is 1.00 MB" in done.stderr
    monkeypatch.setenv("XPEER_TRAINING_CHECK_FIT", "warn")
    command = ["start", "--home", str(tmp_path / "h"), "--dry-run", "--skip-trial"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == ExitCode.OK, done.stderr
    assert "memory of this machine is 1.00 MB" in done.stderr


def test_a_founder_hears_what_a_node_needs(tmp_path: Path) -> None:
    code, err = init(tmp_path / "h", "--preset", "tiny", "--skip-trial", "--set", "round.group=3")
    assert code == 0, err
    for part in ("less than", "for a step", "for checkpoints", "in each window with 2 partners"):
        assert part in err
    assert "warning: a node" not in err


@pytest.mark.parametrize(("charged", "ends"), [(2, "at the end"), (3, "after 0 more steps")])
def test_a_dry_run_counts_what_was_charged_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, charged: int, ends: str
) -> None:
    home = Home(tmp_path)
    with open_declared(home.ledger_db) as ledger:
        ledger.charge(Segment(1.0, 1.0, charged))  # epsilon is 7 of 2 steps, and 9 of 3
    home.checkpoints.mkdir()
    (home.checkpoints / "ckpt-000000040.safetensors").write_bytes(b"")
    shard = SimpleNamespace(lines=list)
    records = torch.zeros(1024, 8, dtype=torch.int64)
    ids = HexIds(np.zeros((1, 2), np.uint64))
    text = SimpleNamespace(records=records, documents=ids, held_out=[], shard=shard, tokens=1,
                           warnings=[])  # fmt: skip
    monkeypatch.setattr(dry_run, "_counted", lambda *_: text)
    manifest = manifest_with(end=End(steps=50), privacy=Privacy(noise_multiplier=50.0, delta=1e-5))
    said: list[str] = []
    config = NodeConfig(training=Training(check_fit="skip"))  # the manifest has no real model
    dry_run.examine(home, config, manifest, said.append, trial=False)
    (line,) = [each for each in said if "noise 50" in each]
    assert line.endswith(ends)
    assert float(line.split("; epsilon ")[1].split()[0]) > 6.5  # of everything


def test_a_dry_run_goes_on_without_text_where_a_start_does(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "shard", 20)
    home, options = tmp_path / "h", ["--preset", "tiny", "--skip-trial"]
    assert init(home, *options, "--shard", shard)[0] == 0
    for file in Path(shard).iterdir():
        file.unlink()
    command = ["start", "--home", str(home), "--dry-run"]
    done = CliRunner().invoke(main, command)
    assert (done.exit_code, "no file" in done.stderr) == (ExitCode.BAD_CONFIG, True), done.stderr
    Home(home).checkpoints.mkdir()
    (Home(home).checkpoints / "ckpt-000000040.safetensors").write_bytes(b"")
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.stderr
    assert "no file" in done.stderr
    assert "a start would take no steps, and only give its model to others" in done.stderr


def test_a_start_says_where_it_begins(tmp_path: Path) -> None:
    from xpeer_daemon.start import beginning

    home = Home(tmp_path)
    assert "fresh, from the parameters of a member; no privacy" in beginning(home, 0.0)
    home.initial_model.mkdir()
    assert "fresh, from the swarm's initial model" in beginning(home, 0.0)
    home.checkpoints.mkdir()
    (home.checkpoints / "ckpt-000000237.safetensors").write_bytes(b"")
    with open_declared(home.ledger_db) as ledger:
        ledger.charge(Segment(1.0, 0.01, 395))
    said = beginning(home, (home.checkpoints / "ckpt-000000237.safetensors").stat().st_mtime + 120)
    assert "resumes from step 237, saved 2 min ago; 395 private steps" in said
    assert "of 8 (delta 1.0e-05)" in said
