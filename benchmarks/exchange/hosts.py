"""Where the peers run: loopback, or network namespaces on a bridge, each with a shaped uplink.

Shaping is the kernel's token bucket (tc tbf) on what a host sends; both directions are shaped, each
by its sender. There is no delay: this kernel's netem is not needed for what is measured here.
Needs root and iproute2 for shaped links. Everything that is made is removed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from xpeer.trainer.child import HUGE_PAGES

_PREFIX = f"xb{os.getpid() % 10_000}"
_SWITCH = f"{_PREFIX}s"
_BURST_BYTES = 64 << 10
"""A token bucket has to hold one of the kernel's 64 KB packets."""
_QUEUE_S = 0.02
_START_TIMEOUT_S = 120.0


class Host:
    """One machine, so to speak.

    Args:
        address: its own.
        namespace: of the network; None = this machine's loopback.
        port: of the switch, to which it is connected; None without a switch.
    """

    def __init__(self, address: str, namespace: str | None, port: str | None = None) -> None:
        self.address = address
        self._namespace, self._port = namespace, port

    def command(self, module: str) -> list[str]:
        """How to start a child module there."""
        return self.inside([sys.executable, "-m", f"benchmarks.exchange.{module}"])

    def inside(self, command: Sequence[str]) -> list[str]:
        """How to start any command there."""
        inside = ["ip", "netns", "exec", self._namespace] if self._namespace else []
        return [*inside, *command]

    def limit(self, mbit_per_s: float) -> None:
        """Shape what it sends and what it receives; of a host with a namespace."""
        assert self._namespace is not None
        assert self._port is not None
        _shape(self._namespace, "wan0", mbit_per_s)
        _shape(_SWITCH, self._port, mbit_per_s)

    def received_bytes(self) -> int:
        """All that came over its link so far; of a host with a namespace."""
        counter = self.inside(["cat", "/sys/class/net/wan0/statistics/rx_bytes"])
        return int(subprocess.run(counter, check=True, capture_output=True).stdout)


@contextlib.contextmanager
def hosts(count: int, mbit_per_s: float | None) -> Iterator[list[Host]]:
    """So many hosts; None = all on loopback, unshaped."""
    if mbit_per_s is None:
        yield [Host("127.0.0.1", None) for _ in range(count)]
        return
    names = [f"{_PREFIX}h{i}" for i in range(count)]
    made: list[str] = []
    try:
        _ip("netns", "add", _SWITCH)
        made.append(_SWITCH)
        _ip("-n", _SWITCH, "link", "add", "br0", "type", "bridge")
        _ip("-n", _SWITCH, "link", "set", "br0", "up")
        for i, name in enumerate(names):
            _ip("netns", "add", name)
            made.append(name)
            peer = ("peer", "name", f"p{i}", "netns", _SWITCH)
            _ip("-n", name, "link", "add", "wan0", "type", "veth", *peer)
            _ip("-n", _SWITCH, "link", "set", f"p{i}", "master", "br0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "addr", "add", f"10.99.0.{i + 1}/24", "dev", "wan0")
            _ip("-n", name, "link", "set", "wan0", "up")
            _shape(name, "wan0", mbit_per_s)
        yield [Host(f"10.99.0.{i + 1}", name, f"p{i}") for i, name in enumerate(names)]
    finally:
        for name in made:
            _ip("netns", "del", name)


def can_shape() -> bool:
    """Whether this user may make namespaces and shape links."""
    try:
        with hosts(1, 100.0):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


class Child:
    """A process that answers each line of JSON with one."""

    def __init__(self, process: asyncio.subprocess.Process, name: str) -> None:
        self._process = process
        self._name = name

    @classmethod
    @contextlib.asynccontextmanager
    async def running(
        cls, host: Host, module: str, **config: Any
    ) -> AsyncIterator[tuple[Child, dict[str, Any]]]:
        """Start it with this configuration: the child and its first answer; it is gone when the
        block ends.
        """
        process = await asyncio.create_subprocess_exec(
            *host.command(module),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**HUGE_PAGES, **os.environ},  # as our trainers; hivemind's peers gain by them, too
            stderr=None if os.environ.get("BENCHMARK_VERBOSE") else asyncio.subprocess.DEVNULL,
            limit=1 << 24,
        )
        child = cls(process, module)
        try:
            yield child, await child.ask(address=host.address, **config)
        finally:
            await child._end()

    async def ask(self, **request: Any) -> dict[str, Any]:
        """One command; its answer.

        Raises:
            RuntimeError: the child said that it failed, or died.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        line = await self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "it died"}
        if "error" in answer:
            raise RuntimeError(f"{self._name}: {answer['error']}")
        return answer

    @staticmethod
    async def ask_all(requests: list[tuple[Child, dict[str, Any]]]) -> list[dict[str, Any]]:
        """Several at once."""
        return await asyncio.gather(*(child.ask(**request) for child, request in requests))

    async def _end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # a child ends with its input
        try:
            async with asyncio.timeout(20):
                await self._process.wait()
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


def _shape(namespace: str, device: str, mbit_per_s: float) -> None:
    """Bound what is sent on a device, in place of an earlier bound."""
    limit = max(int(mbit_per_s * 1e6 / 8 * _QUEUE_S), 2 * _BURST_BYTES)
    shape = ["rate", f"{mbit_per_s}mbit", "burst", str(_BURST_BYTES), "limit", str(limit)]
    _run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", "tbf", *shape)


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
