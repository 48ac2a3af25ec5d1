"""The demo's promises that can be checked without running all of it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from xpeer.cli.demo import corpora, flow, plan
from xpeer.cli.demo.daemons import Daemons, first_address
from xpeer.cli.demo.warmup import records_of
from xpeer.errors import LocalError
from xpeer.training.model import from_folder

BOOTSTRAP = ["bootstrap", "--swarm", "ab" * 32, "--listen", "/ip4/127.0.0.1/tcp/0", "--json"]


@pytest.mark.parametrize("kind", corpora.LABELS)
def test_held_out_text_is_in_no_shard_and_the_choice_repeats(kind):
    first, second = corpora.collect(kind, 200_000), corpora.collect(kind, 200_000)
    assert first == second
    assert first.texts
    assert first.held_out
    assert not set(first.texts) & set(first.held_out)


def test_records_never_cross_texts():
    records = records_of(["a" * 20, "b" * 20], 8)
    assert records.shape == (4, 8)
    assert all(len(set(row.tolist())) == 1 for row in records)


def test_an_interrupt_ends_every_daemon(tmp_path: Path):
    daemons = Daemons(tmp_path / "logs")
    with pytest.raises(KeyboardInterrupt), daemons.running():
        daemons.start("seed", [*BOOTSTRAP, "--home", str(tmp_path / "home")], {})
        assert first_address(daemons, "seed", 60).startswith("/ip4/127.0.0.1/tcp/")
        pid = daemons._processes["seed"].pid
        sidecars = children_of(pid)
        raise KeyboardInterrupt
    assert sidecars
    assert not any(alive(p) for p in [pid, *sidecars])


def test_a_daemon_that_dies_is_named_with_its_last_words(tmp_path: Path):
    daemons = Daemons(tmp_path / "logs")
    with daemons.running():
        daemons.start("seed", ["bootstrap", "--swarm", "xyz", "--home", str(tmp_path / "h")], {})
        assert daemons.wait("seed", 60) == 8
        with pytest.raises(LocalError, match="seed ended with 8") as caught:
            daemons.check_alive()
    assert "64 hex digits" in str(caught.value)


def test_daemons_die_with_a_demo_that_is_killed(tmp_path: Path):
    """As by the out-of-memory killer: no `finally` runs, the kernel ends them."""
    code = (
        "import sys, time; from pathlib import Path;"
        "from xpeer.cli.demo.daemons import Daemons, first_address;"
        "d = Daemons(Path(sys.argv[1]) / 'logs');"
        f"d.start('seed', {BOOTSTRAP!r} + ['--home', sys.argv[1] + '/home'], {{}});"
        "first_address(d, 'seed', 60); print(d._processes['seed'].pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as demo:
        assert demo.stdout is not None
        pid = int(demo.stdout.readline())
        watched = os.pidfd_open(pid)
        demo.send_signal(signal.SIGKILL)
        ready, _, _ = select.select([watched], [], [], 30)  # not our child: by its descriptor
        os.close(watched)
    assert ready


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.timeout(600)
def test_the_whole_demo_with_few_steps(tmp_path: Path):
    """Corpora, public start, founding, invitations, three daemons, report, export."""
    few = replace(
        plan.QUICK, steps=5, start_steps=5, shard_bytes=300_000, held_out_records=8,
        batch_records=8,
    )  # fmt: skip
    report = flow.Demo(tmp_path, 1, few).run()
    assert {peer.corpus for peer in report.peers} == set(corpora.PRIVATE)
    assert all(peer.steps > 0 and peer.exchanges > 0 for peer in report.peers)
    assert 0 < report.epsilon <= 8
    assert Path(report.report).stat().st_size > 10_000
    # what transformers alone computes is what the founder's last checkpoint has
    assert report.loss_exported == pytest.approx(report.peers[0].loss_swarm, abs=0.02)
    exported = from_folder(Path(report.checkpoint))
    assert sum(each.numel() for each in exported.parameters()) > 0
