"""D06: every signal that kills by default ends a node properly, or does nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cases.support import Nodes, found
from tests.unit.trainer.processes import Watch
from tests.unit.training.homes import make_homes
from xpeer.config import Home
from xpeer.trainer.client import Saved, TrainerProcess
from xpeer.training.checkpoint_files import paths


@pytest.mark.timeout(180)
def test_a_closed_terminal_loses_nothing(nodes: Nodes, shard: Path) -> None:
    found(nodes.home("a"), shard, fields=["end.steps=100000"])
    nodes.start("a")
    nodes.until("a", lambda s: s.progress.step > 0)
    os.killpg(nodes.pid("a"), signal.SIGHUP)
    status = nodes.daemons.wait("a", 60)
    saved = bool(paths(Home(nodes.home("a")).checkpoints))
    assert (status, saved) == (0, True), f"exit {status}, saved: {saved}"
    assert "SIGHUP: saving and ending" in nodes.log("a")


TAKES_SIGNALS = """
import asyncio, os, signal, sys
from xpeer import signals

async def main():
    ended = asyncio.Queue()
    signals.end_by(asyncio.get_running_loop(), lambda: ended.put_nowait(1))
    for number in signals.IGNORED:
        os.kill(os.getpid(), number)
    for number in sorted(signals.ENDING):
        if number == signal.SIGHUP and sys.argv[1:] == ["nohup"]:
            os.kill(os.getpid(), number)
            continue
        os.kill(os.getpid(), number)
        async with asyncio.timeout(20):
            await ended.get()
    print(ended.qsize())

asyncio.run(main())
"""


@pytest.mark.parametrize("nohup", [False, True])
def test_every_killer_ends_properly_or_is_ignored(nohup: bool) -> None:
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    done = subprocess.run(
        [sys.executable, "-c", TAKES_SIGNALS, *(["nohup"] if nohup else [])],
        preexec_fn=ignore if nohup else None, capture_output=True, text=True, timeout=50,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


def test_no_killer_was_forgotten() -> None:
    from xpeer import signals

    left = {signal.Signals(n).name for n in signals._LEFT}
    assert left >= {"SIGKILL", "SIGSTOP", "SIGSEGV", "SIGABRT"}
    every = {int(n) for n in signal.valid_signals()}
    assert every == {int(n) for n in (*signals.ENDING, *signals.IGNORED, *signals._LEFT)} & every


async def test_the_trainer_process_leaves_its_end_to_the_daemon(tmp_path: Path) -> None:
    """But for XCPU, whose hard limit would kill it: it saves, and the daemon starts another."""
    from xpeer import signals

    setup, watch = make_homes(tmp_path, 1)[0], Watch()
    trainer = await TrainerProcess.start(setup, watch)
    await watch.step(1)
    for number in (signals.ENDING | signals.IGNORED) - {signal.SIGXCPU}:
        os.kill(trainer.pid, number)
    await watch.step(trainer.progress.step + 2)
    assert not trainer.exited.done()
    os.kill(trainer.pid, signal.SIGXCPU)
    assert await asyncio.wait_for(asyncio.shield(trainer.exited), 50) == 0
    assert any(isinstance(event, Saved) for event in watch.events)
