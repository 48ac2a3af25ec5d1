"""A process of the rig: several real peers in one event loop, told what to do on standard input.

One line of JSON in, one out: {"do": "start" | "exchange" | "pause" | "kill" | "add" | "counters" |
"counts" | "quit", ...}. Every second it notes which members each of its peers lists.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import uvloop

from benchmarks.scale.peers import RigPeer, stop_all
from xpeer.identity import Identity


class Worker:
    """The peers of this process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._peers: list[RigPeer] = []
        self._views: dict[int, dict[str, str]] = {}
        self._sampling: asyncio.Task[None] | None = None
        self._ended_s = 0.0
        self._admin: Identity
        self._slot_s: float

    async def do(self, order: dict[str, Any]) -> dict[str, Any]:
        """Carry out one order."""
        what = order["do"]
        if what == "start":
            self._admin = Identity.from_libp2p(bytes.fromhex(order["admin"]))
            self._slot_s = float(order["slot_s"])
            for number in order["numbers"]:
                await self._start(number, order["seeds"])
            if self._sampling is None:
                self._sampling = asyncio.create_task(self._sample())
            return {"addresses": [a for peer in self._peers for a in peer.swarm.addresses]}
        if what in ("exchange", "pause"):
            for peer in self._running():
                peer.exchanging = what == "exchange"
            return {}
        if what == "kill":
            victim = self._running()[-1]
            self._ended_s += _used(victim.sidecar_pid)
            await victim.close()
            return {}
        if what == "add":
            await self._start(order["number"], order["seeds"])
            self._peers[-1].exchanging = True
            return {}
        if what == "counters":
            return self._counters()
        if what == "counts":
            return {"peers": [p.counts() for p in self._peers], "views": self._views}
        raise ValueError(what)

    async def close(self) -> None:
        """End everything."""
        if self._sampling is not None:
            self._sampling.cancel()
        await stop_all(self._peers)

    async def _start(self, number: int, seeds: list[str]) -> None:
        peer = RigPeer(number, self._folder, self._admin, self._slot_s)
        await peer.start(seeds)
        self._peers.append(peer)

    def _running(self) -> list[RigPeer]:
        return [peer for peer in self._peers if not peer.closed]

    async def _sample(self) -> None:
        while True:
            second = int(time.time())
            self._views[second] = {str(p.number): p.view() for p in self._running()}
            await asyncio.sleep(second + 1 - time.time())

    def _counters(self) -> dict[str, Any]:
        return {
            "peers": len(self._running()),
            "exchanges": sum(peer.book.exchanges for peer in self._peers),
            "payload_bytes": sum(peer.book.payload_bytes_sent for peer in self._peers),
            "daemon_s": time.process_time(),
            "sidecar_s": self._ended_s + sum(_used(peer.sidecar_pid) for peer in self._running()),
        }


def _used(pid: int) -> float:
    """CPU seconds of a process."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


async def main() -> None:
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    with tempfile.TemporaryDirectory() as folder:
        worker = Worker(Path(folder))
        try:
            while line := await reader.readline():
                order = json.loads(line)
                if order["do"] == "quit":
                    break
                sys.stdout.write(json.dumps(await worker.do(order)) + "\n")
                sys.stdout.flush()
        finally:
            await worker.close()


if __name__ == "__main__":
    uvloop.run(main())
