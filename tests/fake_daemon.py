"""A control API over a node that only keeps a log of calls: in a thread, or as a process."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xpeer.control import End
from xpeer.phase import Phase
from xpeer.status import Partner, PrivacySpent, Progress, Status
from xpeer_daemon.api import ControlApi

ME = "12D3KooWMe"
OTHER = "12D3KooWOther"

HEALTHY = Status(
    health="ok",
    state=Phase.TRAINING,
    peer_id=ME,
    swarm_id="ab" * 32,
    swarm_name="demo",
    version="0.1.0",
    pid=1,
    uptime_s=3725,
    addresses=["/ip4/192.0.2.1/tcp/4001/p2p/12D3KooWMe"],
    num_params=1000,
    device="cpu",
    precision="float32",
    round=12,
    progress=Progress(
        step=240, planned_steps=1000, tokens=123456, loss_train=3.25, loss_validation=3.5,
        loss_public=4.125, loss_train_age_s=1.0, loss_measured_step=230,
        loss_measured_age_s=12.0, tokens_per_s=4321.0, consensus_distance=0.0125,
        seconds_training=900.0, seconds_here=100.0,
        seconds_blocked=1.5,
    ),
    privacy=PrivacySpent(
        epsilon_spent=3.25, epsilon_target=8.0, delta=1e-5, noise_multiplier=1.125,
        steps_charged=400, steps_left=600, engine="exact",
    ),
    partners=[
        Partner(
            peer_id=OTHER, name="beta", step=231, step_age_s=4.0, exchange_s=1.5,
            phase="training", addresses=["/ip4/192.0.2.2/tcp/4001"], exchanges=40,
            failures=2, last_reason="timeout", last_exchange_age_s=3.0, bytes_in=10, bytes_out=20,
        ),
        Partner(peer_id="12D3KooWGone", state="missed", silent_s=125.0),
    ],
    exchanges_done=40,
    exchanges_failed={"timeout": 2},
    bytes_in=12_300_000,
    bytes_out=2_000_000_000,
    egress_cost=0.18,
    currency="USD",
    compression_ratio=3.9,
    last_good_round_age_s=3.0,
    last_checkpoint_age_s=120.0,
)  # fmt: skip


class FakeNode:
    """A `ControlledNode` that says what it is told to."""

    def __init__(self, status: Status = HEALTHY) -> None:
        self.calls: list[str] = []
        self.statuses = [status]
        self.error: Exception | None = None
        self.paused_as = "paused"
        self.killed = False
        """True iff the process is killed once it is asked how its end goes."""
        self.ending = End(over=True)
        self.followed: list[bool] = []
        """Of each stop, whether its client will ask how the end went."""
        self.stopped, self.told = asyncio.Event(), asyncio.Event()

    def status(self) -> Status:
        self.calls.append("status")
        return self.statuses[0]

    async def pause(self) -> str:
        await self._called("pause")
        return self.paused_as

    async def resume(self) -> str:
        await self._called("resume")
        return "training"

    def request_stop(self, *, leave: bool, followed: bool = False) -> None:
        self.calls.append("leave" if leave else "stop")
        self.followed.append(followed)
        self.stopped.set()

    async def end(self) -> End:
        self.calls.append("end")
        if self.killed:
            os.kill(os.getpid(), signal.SIGKILL)
        self.told.set()
        return self.ending

    async def checkpoint(self) -> str:
        await self._called("checkpoint")
        return "/checkpoints/240"

    async def _called(self, name: str) -> None:
        self.calls.append(name)
        if self.error is not None:
            raise self.error


@contextmanager
def answering(path: Path, status: Status = HEALTHY) -> Iterator[FakeNode]:
    """A daemon at this socket while the block runs."""
    node, loop, ready = FakeNode(status), asyncio.new_event_loop(), threading.Event()
    closing = asyncio.Event()

    async def serve() -> None:
        api = await ControlApi.start(path, node)
        ready.set()
        await closing.wait()
        await api.close()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        if not ready.wait(20):
            raise RuntimeError("the fake daemon did not start")
        yield node
    finally:
        loop.call_soon_threadsafe(closing.set)
        thread.join()
        loop.close()


async def _until_stopped(path: Path, way: str) -> None:
    api = await ControlApi.start(path, node := FakeNode())
    if way == "killed":  # while the first question for its end is open
        node.killed = True
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await node.stopped.wait()
    if way != "obeys":
        await asyncio.Event().wait()
    if node.followed == [True]:
        await node.told.wait()
    await api.close()


if __name__ == "__main__":
    asyncio.run(_until_stopped(Path(sys.argv[1]), *(sys.argv[2:] or ["obeys"])))
