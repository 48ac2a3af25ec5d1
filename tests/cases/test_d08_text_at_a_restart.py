"""D08: a fault of the shard's text that is met at a later start leaves the node up."""

from __future__ import annotations

import errno
import io
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tests.cases.support import Nodes, found, trainer_of, xpeer
from tests.unit.training.homes import make_homes
from xpeer.config import Data, Home
from xpeer.errors import ConfigError, LocalError, PeerError
from xpeer.status import Status
from xpeer.trainer.setup import TrainerSetup

ROW = '{"text": "the quick brown fox jumps over a lazy dog, and runs home before rain %d"}\n'


@pytest.mark.timeout(240)
def test_a_half_written_line_does_not_end_a_node_that_trains(nodes: Nodes, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(ROW % n for n in range(300)))
    found(nodes.home("a"), rows, fields=["end.steps=100000"])
    nodes.start("a", XPEER_TRAINING_THROTTLE="0.2")  # it is waited for, and need not hurry
    trained = nodes.until("a", lambda s: s.progress.step > 0)
    assert xpeer("checkpoint", "save", "--home", nodes.home("a")).returncode == 0
    whole = rows.read_bytes()
    rows.write_bytes(whole + b'{"text": "half a li')
    os.kill(trainer_of(nodes.pid("a")), signal.SIGKILL)
    ended: list[int | None] = []
    reasons: list[str] = []

    def mixing(status: Status) -> bool:
        reasons[:] = [str(reason) for reason in status.reasons]
        return status.state == "mixing"

    try:
        nodes.until("a", mixing, 60)
    except AssertionError:
        ended.append(nodes.daemons._processes["a"].poll())
    assert not ended, f"the daemon ended with {ended[0]}"
    assert any("rows.jsonl:301" in told and "without training" in told for told in reasons)
    rows.write_bytes(whole)
    again = nodes.until("a", lambda s: s.state == "training" and s.progress.step > 0)
    assert again.privacy.steps_charged >= trained.privacy.steps_charged
    assert nodes.stop("a") == 0


Fault = Callable[[Path], object]


def half_a_line(shard: Path) -> None:
    (shard / "x.jsonl").write_bytes((ROW % 1).encode() + b'{"text": "hal')


def only_a_pipe(shard: Path) -> None:
    no_files(shard)
    os.mkfifo(shard / "x.txt")


def no_files(shard: Path) -> None:
    for path in shard.iterdir():
        path.unlink()


def a_link_to_nowhere(shard: Path) -> None:
    no_files(shard)
    (shard / "x.txt").symlink_to("gone")


def a_link_to_itself(shard: Path) -> None:
    shutil.rmtree(shard)
    shard.symlink_to(shard)


def a_key(shard: Path) -> None:
    (shard / "swarm.key").write_text("key")


def nothing_but(data: bytes, name: str = "x.txt") -> Fault:
    def fault(shard: Path) -> None:
        no_files(shard)
        (shard / name).write_bytes(data)

    return fault


FAULTS: dict[str, Fault] = {
    "half a line": half_a_line,
    "no folder": shutil.rmtree,
    "no files": no_files,
    "only a pipe": only_a_pipe,
    "not UTF-8": lambda shard: (shard / "x.txt").write_bytes(b"\xff\xfe"),
    "empty files": nothing_but(b""),
    "too short for a record": nothing_but(b"x"),
    "no JSON": nothing_but(b"[", "x.jsonl"),
    "half a parquet file": nothing_but(b"PAR1", "x.parquet"),
    "a link to nowhere": a_link_to_nowhere,
    "a link to itself": a_link_to_itself,
    "a key of a node": a_key,
}


@pytest.fixture(scope="module", params=["off", "record"])
def home_that_trained(request: pytest.FixtureRequest, tmp_path_factory: Any) -> TrainerSetup:
    """After two steps and a checkpoint."""
    from xpeer.trainer.build import assemble

    torch.set_num_threads(1)  # two on a busy machine take ten times as long
    folder = tmp_path_factory.mktemp(request.param)
    changes = ("end.steps=100", "privacy.noise_multiplier=2")
    setup = make_homes(folder, 1, privacy=request.param, changes=changes)[0]
    node = assemble(setup)
    node.trainer.run(steps=2)
    node.checkpoints.copy()()
    node.close()
    return setup


@pytest.fixture
def setup(home_that_trained: TrainerSetup, tmp_path: Path) -> TrainerSetup:
    """With a copy of its text for the test to spoil."""
    config = home_that_trained.config
    shard = shutil.copytree(config.data.shard[0], tmp_path / "shard")
    config = msgspec.structs.replace(config, data=Data(shard=[str(shard)]))
    return msgspec.structs.replace(home_that_trained, config=config, has_trained=True)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_without_its_text_a_trainer_serves_and_takes_no_step(
    setup: TrainerSetup, fault: Fault
) -> None:
    from xpeer.trainer.build import assemble

    if fault is not half_a_line and "record" in setup.home:
        pytest.skip("the modes differ in stamps, not in how text is read")
    fault(Path(setup.config.data.shard[0]))
    first = msgspec.structs.replace(setup, has_trained=False)
    with pytest.raises(ConfigError) as error:
        assemble(first)
    assert error.value.exit_code == 8
    node = assemble(setup)
    try:
        assert node.beginning.text.problem == str(error.value)
        assert node.trainer.counters.step == 2
        node.trainer.set_mode("mix")
        charged = node.ledger.steps_charged
        private = node.trainer.snapshot(1, 0, averaging=True)
        assert private.stamp.steps_charged == charged
        assert node.ledger.steps_charged == charged
        node.checkpoints.copy()()
    finally:
        node.close()


class _FullDisk(io.FileIO):
    def write(self, _: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_a_node_up_and_no_half_written_file(
    setup: TrainerSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To close the file writes what is left once more: that error took the place of ours."""
    from xpeer.trainer.build import assemble
    from xpeer.training import token_file

    if "record" in setup.home:
        pytest.skip("the modes differ in stamps, not in how text is read")
    monkeypatch.setattr(
        token_file, "open", lambda fd, mode: io.BufferedWriter(_FullDisk(fd, mode)), raising=False
    )
    node = assemble(setup)
    node.close()
    assert "No space left on device" in node.beginning.text.problem
    assert not [*Home(Path(setup.home)).cache.rglob(f"{token_file.STAGING}*")]


def test_it_goes_on_when_the_text_is_there_again(setup: TrainerSetup) -> None:
    from xpeer.trainer.build import assemble

    if "record" in setup.home:
        pytest.skip("one mode will do")
    shard = Path(setup.config.data.shard[0])
    half_a_line(shard)
    node = assemble(setup)
    assert node.beginning.text.look_again is not None
    with pytest.raises(ConfigError):
        node.beginning.text.look_again()
    (shard / "x.jsonl").unlink()
    node.beginning.text.look_again()
    node.close()
    node = assemble(setup)
    assert node.beginning.text.look_again is None
    node.trainer.run(steps=1)
    assert node.trainer.counters.step == 3
    node.close()


def damage(path: Path) -> None:
    path.write_bytes(b"no database" * 200)


OTHERS: dict[str, Callable[[Home, Path], object]] = {
    "ledger": lambda home, _register: damage(home.ledger_db),
    "register": lambda _home, register: damage(register / "register.sqlite"),
    "register key": lambda _home, register: (register / "register.key").unlink(),
    "manifest": lambda home, _register: home.manifest.write_text("{}"),
    "checkpoints": lambda home, _register: [
        path.write_bytes(b"damaged") for path in home.checkpoints.iterdir()
    ],
}


@pytest.mark.parametrize("broken", OTHERS)
@pytest.mark.parametrize("text", ["there", "missing"])
def test_other_faults_end_the_start_with_or_without_text(
    setup: TrainerSetup, tmp_path: Path, broken: str, text: str
) -> None:
    from xpeer.trainer.build import assemble

    if "record" not in setup.home:
        pytest.skip("one mode will do")
    if text == "missing":
        no_files(Path(setup.config.data.shard[0]))
    home = shutil.copytree(setup.home, tmp_path / "home")
    register = shutil.copytree(setup.config.privacy.register, tmp_path / "register")
    privacy = msgspec.structs.replace(setup.config.privacy, register=str(register))
    config = msgspec.structs.replace(setup.config, privacy=privacy)
    OTHERS[broken](Home(home), register)
    with pytest.raises((LocalError, PeerError)):
        assemble(
            msgspec.structs.replace(
                setup, home=str(home), manifest_path=str(home / "manifest.json"), config=config
            )
        )


def test_a_setting_that_names_no_text_is_no_fault_of_the_text(setup: TrainerSetup) -> None:
    from xpeer.trainer.build import assemble

    config = msgspec.structs.replace(setup.config, data=Data(shard=[]))
    with pytest.raises(ConfigError):
        assemble(msgspec.structs.replace(setup, config=config))


def test_a_home_has_trained_when_it_has_a_checkpoint_or_charged(tmp_path: Path) -> None:
    from xpeer.accounts.trained import has_trained

    home = Home(tmp_path / "home")
    home.path.mkdir()
    assert not has_trained(home)
    home.checkpoints.mkdir()
    assert not has_trained(home)
    (home.checkpoints / "ckpt-000000003.safetensors").touch()
    assert has_trained(home)
    other = Home(tmp_path / "other")
    other.path.mkdir()
    damage(other.ledger_db)
    with pytest.raises(LocalError):
        has_trained(other)
