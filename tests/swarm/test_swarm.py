"""Sidecars that hang, owners that are killed, peers that forget: nothing is left, nobody waits."""

from __future__ import annotations

import asyncio
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import uvloop
from hivemind.dht import protocol as hivemind_protocol
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError

from tests.swarm.conftest import LOOPBACK, Founder, Launch
from tests.swarm.test_network import ECHO, echo, until
from xpeer.errors import LocalError, PeerError, Reason
from xpeer.identity import Identity
from xpeer.network import introductions, p2p, swarm
from xpeer.network.membership.certificates import Membership
from xpeer.network.swarm import Swarm

ROOT = Path(__file__).parents[2]
OWNER = """
import asyncio, sys
from pathlib import Path
from xpeer.identity import Identity
from xpeer.network.membership.certificates import Membership
from xpeer.network.swarm import Swarm

async def main():
    identity, path = Identity.generate(), Path(sys.argv[1])
    identity.save(path)
    swarm = await Swarm.start(
        identity, path, Membership("ab" * 32, None), listen=["/ip4/127.0.0.1/tcp/0"]
    )
    print(swarm._p2p._child.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def children() -> set[int]:
    """Processes of ours that run."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(child) for task in tasks for child in task.read_text().split()}


def state_of(task: Path) -> str:
    """Of a process or thread, as in proc(5): T = stopped."""
    return (task / "stat").read_text().rpartition(")")[2].split()[0]


def test_a_sidecar_ends_with_an_owner_that_is_killed(tmp_path: Path):
    """As by the out-of-memory killer: no `finally` runs."""
    with (
        tempfile.TemporaryDirectory(prefix="xt-") as sockets,  # what the killed owner leaves
        subprocess.Popen(
            [sys.executable, "-c", OWNER, str(tmp_path / "key")],
            stdout=subprocess.PIPE, cwd=ROOT, text=True, env={**os.environ, "TMPDIR": sockets},
        ) as owner,
    ):  # fmt: skip
        assert owner.stdout is not None
        sidecar = os.pidfd_open(int(owner.stdout.readline()))
        owner.send_signal(signal.SIGKILL)
        ready, _, _ = select.select([sidecar], [], [], 20)  # not our child: by its descriptor
        os.close(sidecar)
    assert ready


def test_everything_works_under_uvloop(tmp_path: Path, founder: Founder):
    async def main() -> None:
        started: list[Swarm] = []
        for name in ("first", "second"):
            identity = Identity.generate()
            identity.save(tmp_path / name)
            started.append(
                await Swarm.start(
                    identity,
                    tmp_path / name,
                    Membership(founder.swarm_id, founder.credential(identity)),
                    listen=[LOOPBACK],
                    seeds=[a for s in started for a in s.addresses],
                )
            )
        first, second = started
        await asyncio.wait_for(second.bootstrapping.reached.wait(), 20)
        await first.serve_call(ECHO, echo, "member", 10)
        assert await second.call(first.peer_id, ECHO, b"x") == b"x"
        os.kill(second._p2p._child.pid, signal.SIGKILL)
        await until(lambda: second.sidecar_restarts == 1)
        assert await second.call(first.peer_id, ECHO, b"y") == b"y"
        await asyncio.gather(*(s.close() for s in started))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


async def test_a_member_that_was_restarted_has_forgotten_us_and_the_call_works(
    pair: tuple[Swarm, Swarm],
):
    first, second = pair
    calls = 0

    async def count(peer_id: str, request: bytes) -> bytes:
        nonlocal calls
        calls += 1
        return request

    await first.serve_call(ECHO, count, "member", 10)
    assert await second.call(first.peer_id, ECHO, b"x") == b"x"
    first.membership._known.clear()
    assert await second.call(first.peer_id, ECHO, b"y") == b"y"
    assert calls == 2
    first.membership._known.clear()  # and so do hivemind's calls
    peer = swarm._hivemind_id(first.peer_id)
    assert await second.dht.protocol.call_ping(peer) == first.dht.node_id


async def test_who_refuses_our_credential_is_not_asked_again_at_once(launch: Launch):
    member = await launch()
    await member.serve_call(ECHO, echo, "member", 10)
    other = await launch(of=Founder())
    other.learn(member.addresses)
    for _ in range(10):
        with pytest.raises(PeerError, match=Reason.NOT_A_MEMBER):
            await other.call(member.peer_id, ECHO, b"x")
    assert member.strangers_refused <= 3  # the pauses double


async def test_every_address_of_a_seed_is_tried(launch: Launch):
    seed = await launch()
    dead = f"/ip4/127.0.0.1/tcp/1/p2p/{seed.peer_id}"
    joiner = await launch(seeds=[*seed.addresses, dead])
    await asyncio.wait_for(joiner.bootstrapping.reached.wait(), 20)


async def test_who_knows_only_the_bootstrap_node_hears_of_members(launch: Launch):
    node = await launch(role=None)
    members = [await launch(seeds=node.addresses) for _ in range(2)]
    for member in members:
        await asyncio.wait_for(member.bootstrapping.reached.wait(), 20)
    await members[0].serve_call(ECHO, echo, "member", 10)
    joiner = await launch(seeds=node.addresses)
    await asyncio.wait_for(joiner.bootstrapping.reached.wait(), 20)
    heard = set(joiner.candidates()) - {node.peer_id}
    assert heard == {m.peer_id for m in members}
    assert await joiner.call(members[0].peer_id, ECHO, b"x") == b"x"


async def test_a_wrong_clock_is_told_to_the_operator(
    pair: tuple[Swarm, Swarm], monkeypatch: pytest.MonkeyPatch
):
    _, second = pair
    real = hivemind_protocol.get_dht_time
    monkeypatch.setattr(hivemind_protocol, "get_dht_time", lambda: real() + 60)  # the other's
    second._bootstrapping.again()
    await until(lambda: "60 s behind" in second.bootstrap_note)
    assert second.bootstrapping.reached.is_set()
    monkeypatch.undo()
    second._bootstrapping.again()
    await until(lambda: second.bootstrap_note == "")


async def test_a_sidecar_that_hangs_holds_up_no_end(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(p2p, "STOP_TIMEOUT_S", 0.5)
    node = await launch()
    child, folder = node._p2p._child, node._p2p._scratch.path
    os.kill(child.pid, signal.SIGSTOP)
    threads = Path(f"/proc/{child.pid}/task")
    await until(lambda: all(state_of(thread) == "T" for thread in threads.iterdir()))
    await asyncio.wait_for(node.close(), 20)
    assert child.returncode == -signal.SIGKILL
    assert not folder.exists()


async def test_a_start_that_fails_leaves_no_sidecar(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
):
    async def fails(*args: object) -> None:
        raise P2PDaemonError("the DHT does not start")

    before = children()
    monkeypatch.setattr(swarm, "start_node", fails)
    with pytest.raises(LocalError, match="does not start"):
        await launch()
    assert children() <= before


async def test_a_stranger_that_knocks_too_often_is_counted(pair, launch: Launch):
    first, _ = pair
    stranger = await launch(role=None)
    await stranger._connect(first.peer_id, first.addresses)
    before = first.strangers_refused
    peer, knocks = swarm._hivemind_id(first.peer_id), 2 * introductions.PER_PEER + 10
    answers = await asyncio.gather(
        *(stranger._p2p.call(peer, introductions.PROTOCOL, b"x") for _ in range(knocks))
    )
    assert first.strangers_refused - before == knocks
    assert 10 <= sum(not ok for ok, _ in answers) <= knocks - introductions.PER_PEER
    big = await stranger._p2p.call(peer, introductions.PROTOCOL, b"x" * 5000)
    assert big[0] is False


def test_hivemind_logs_like_everybody_else(caplog: pytest.LogCaptureFixture):
    logger = logging.getLogger("hivemind.dht")
    assert not logging.getLogger("hivemind").handlers
    assert logging.getLevelName(logging.WARNING) == "WARNING"
    logger.warning("one line")
    assert caplog.text.count("one line") == 1
