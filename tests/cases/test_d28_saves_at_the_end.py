"""D28: an end does not lose what it was for, or says so."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cases.slow_disk_trainer import SAVE_S
from tests.cases.support import Nodes, found, trainer_of, xpeer
from tests.unit.trainer.processes import Watch
from tests.unit.training.homes import make_homes
from xpeer.config import SOCKET, Daemon, Home, NodeConfig
from xpeer.control import Client, End
from xpeer.errors import LocalError, NotSavedError
from xpeer.status import Progress
from xpeer.trainer.client import Saved, TrainerProcess
from xpeer.trainer.ended import Ended
from xpeer.training.checkpoint_files import paths, step_of

PATIENCE_S = 2.0


async def test_a_save_that_gets_on_is_not_killed(tmp_path: Path) -> None:
    assert SAVE_S > 2 * PATIENCE_S
    # the first checkpoint is due at the end of the first window: none before the stop
    setup, watch = make_homes(tmp_path, 1, changes=("round.window_steps=1000",))[0], Watch()
    program = "tests.cases.slow_disk_trainer"
    trainer = await TrainerProcess.start(setup, watch, program=program)
    await watch.step(2)
    status = await trainer.stop(PATIENCE_S)
    saved = [step_of(path) for path in paths(Home(Path(setup.home)).checkpoints)]
    assert (status, len(saved)) == (0, 1), "killed in the middle of its save"
    assert saved[0] >= 2


@pytest.mark.timeout(180)
def test_what_could_not_be_saved_is_told(nodes: Nodes, shard: Path) -> None:
    # the first checkpoint is due at the end of the first window
    found(nodes.home("a"), shard, fields=["end.steps=100000", "round.window_steps=1000"])
    nodes.start("a", XPEER_DAEMON_STOP_TIMEOUT_S="2")
    nodes.until("a", lambda s: s.progress.step > 0)
    os.kill(trainer_of(nodes.pid("a")), signal.SIGSTOP)
    done = xpeer("stop", "--home", nodes.home("a"))
    assert done.returncode == 9, f"exit {done.returncode}: {done.stdout}{done.stderr}"
    said = r"not saved: there is no checkpoint, the node was at step \d+: .* - .+"
    assert re.search(f"xpeer: error: {said}", done.stderr)
    assert nodes.daemons.wait("a", 30) == 9
    assert re.search(f" error xpeer.daemon: {said}", nodes.log("a"))


class FakeTrainer:
    """Ends as it is told to."""

    num_params, crash, gave_up = 135_000_000, None, False

    def __init__(self, status: int, step: int, tells: int = 0) -> None:
        self.status, self.step, self.tells = status, step, tells
        self.ended = Ended(status)
        self.progress = Progress(step=10, seconds_training=300.0)

    async def stop(self, patience_s: float, on_progress: Any) -> int:
        from xpeer.trainer.answers import Ending

        self.patience_s = patience_s
        for n in range(self.tells):
            on_progress(Ending(work=n, written=n * 10**8, total=10**9))
        return self.status


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield receiver


async def test_the_time_follows_from_size_and_steps_and_is_asked_of_systemd(
    tmp_path: Path, systemd: socket.socket
) -> None:
    from xpeer_daemon.ending import SPARE_S, Ends

    ends, trainer = Ends(Home(tmp_path), NodeConfig()), FakeTrainer(0, 10, tells=3)
    assert await ends.save(trainer)  # type: ignore[arg-type] # a fake
    steps_s, bytes_s = 4 * 30.0, 12 * 135e6 / 50e6
    assert trainer.patience_s == pytest.approx(steps_s + bytes_s)
    asked = [systemd.recv(100).decode() for _ in range(4)]
    assert set(asked) == {f"EXTEND_TIMEOUT_USEC={int((trainer.patience_s + SPARE_S) * 1e6)}"}
    assert ends.lost is None


@pytest.mark.parametrize("crash", [None, LocalError("disk full", "free space")])
@pytest.mark.parametrize("saved", [None, 7, 12])
async def test_what_is_lost_is_counted_from_the_last_checkpoint(
    tmp_path: Path, crash: LocalError | None, saved: int | None
) -> None:
    from xpeer.training import checkpoint
    from xpeer.training.checkpoint import Bundle
    from xpeer_daemon.ending import Ends

    home = Home(tmp_path)
    home.checkpoints.mkdir()
    if saved is not None:
        flat = torch.ones(8)
        whole = Bundle(flat, flat * 2, flat * 3, saved, counters={"step": saved})
        checkpoint.save(home.checkpoints, whole)
    ends = Ends(home, NodeConfig(daemon=Daemon(stop_timeout_s=1.0)))
    trainer = FakeTrainer(-9, 12)
    trainer.crash = crash  # type: ignore[assignment]
    nothing_lost = saved == 12
    assert await ends.save(trainer) == nothing_lost  # type: ignore[arg-type] # a fake
    await ends.over()
    end = await ends.progress()
    assert end.over
    if nothing_lost:
        assert (end.problem, end.exit_code) == ("", 0)
        return
    assert end.exit_code == 9
    last = "last checkpoint step 7 (0s old)" if saved else "there is no checkpoint"
    cause = crash.problem if crash else "the trainer was killed by SIGKILL, which"
    assert end.problem.startswith(f"not saved: {last}, the node was at step 12: {cause}")
    assert end.remedy


async def test_reading_the_last_checkpoint_asks_systemd_for_its_time(
    tmp_path: Path, systemd: socket.socket
) -> None:
    """A large one on a slow disk takes minutes, and the client has not heard what is lost."""
    from xpeer_daemon import ending

    ends, trainer = ending.Ends(Home(tmp_path), NodeConfig()), FakeTrainer(-9, 10)
    ends._home.checkpoints.mkdir()
    damaged = ends._home.checkpoints / "ckpt-000000007.safetensors"
    with damaged.open("wb") as file:
        file.truncate(int(60 * ending.SLOWEST_READ_BYTES_PER_S))
    await ends.note_loss(trainer, LocalError("killed"))  # type: ignore[arg-type] # a fake
    asked_s = 60 + ending.SPARE_S
    assert systemd.recv(100).decode() == f"EXTEND_TIMEOUT_USEC={int(asked_s * 1e6)}"
    assert ends.lost is not None


async def test_the_node_stays_until_a_client_that_follows_its_end_has_heard_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It asks now and then: between two of its questions the node could be gone."""
    from xpeer_daemon import ending

    monkeypatch.setattr(ending, "WAIT_S", 0.01)
    ends = ending.Ends(Home(tmp_path), NodeConfig())
    assert not (await ends.progress()).over
    leaving = asyncio.create_task(ends.over())
    done, _ = await asyncio.wait({leaving}, timeout=0.05)
    assert not done
    assert (await ends.progress()).over
    await leaving

    quick = ending.Ends(Home(tmp_path), NodeConfig())
    quick.follow()  # `xpeer stop` was answered, and has not asked yet
    leaving = asyncio.create_task(quick.over())
    done, _ = await asyncio.wait({leaving}, timeout=0.05)
    assert not done
    assert (await quick.progress()).over
    await leaving

    monkeypatch.setattr(ending, "TELL_S", 0.01)
    deserted = ending.Ends(Home(tmp_path), NodeConfig())
    assert not (await deserted.progress()).over
    await deserted.over()


class Follower(Client):
    """Notes when it has heard that the end is not over."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.heard = threading.Event()

    def ask(self, route: str, answer: type[Any]) -> Any:
        given = super().ask(route, answer)
        if isinstance(given, End):
            self.heard.set()
        return given


@pytest.mark.timeout(180)
def test_a_node_that_is_killed_while_it_ends_is_no_success(nodes: Nodes, shard: Path) -> None:
    found(nodes.home("a"), shard, fields=["end.steps=100000", "round.window_steps=100000"])
    nodes.start("a", XPEER_DAEMON_STOP_TIMEOUT_S="60")
    nodes.until("a", lambda s: s.progress.step > 0)
    daemon = nodes.pid("a")
    os.kill(trainer_of(daemon), signal.SIGSTOP)
    client = Follower(nodes.home("a") / SOCKET)
    with ThreadPoolExecutor(1) as pool:
        stopping = pool.submit(client.stop_and_wait, 120)
        assert client.heard.wait(60)
        os.kill(daemon, signal.SIGKILL)
        with pytest.raises(NotSavedError, match="did not say that its steps are saved"):
            stopping.result()


async def test_a_disk_that_takes_no_checkpoint_is_the_trainers_last_word(tmp_path: Path) -> None:
    setup, watch = make_homes(tmp_path, 1)[0], Watch()
    trainer = await TrainerProcess.start(setup, watch)
    await watch.until(lambda event: isinstance(event, Saved))  # the first one: no other is due
    folder = Home(Path(setup.home)).checkpoints
    shutil.rmtree(folder)
    folder.write_text("in the way of the folder")
    assert await trainer.stop(60) != 0
    assert trainer.crash is not None
    assert "can't be written" in trainer.crash.problem
