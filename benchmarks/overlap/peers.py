"""Two members of a swarm on two hosts: founded, invited and asked by the public command line."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.daemons import Daemon, ending
from benchmarks.overlap import timeline
from benchmarks.overlap.timeline import Row
from benchmarks.overlap.trainer import STEP_VARIABLE, TIMELINE
from xpeer.cli.demo.daemons import call
from xpeer.config import NodeConfig
from xpeer.control import Client

_PORT = 4001
_START_TIMEOUT_S = 300.0
_END_TIMEOUT_S = 60.0
_POLL_S = 0.25
_TEXT = "Nothing is learnt from this text: a step that is emulated reads none.\n" * 200


class Peer(Daemon):
    """A daemon on a host of its own.

    Args:
        folder: of all peers.
        name: its own.
        namespace: network namespace of its host.
        address: of its host.
    """

    def __init__(self, folder: Path, name: str, namespace: str, address: str) -> None:
        super().__init__(folder, name)
        self._namespace = namespace
        self._listen = f"/ip4/{address}/tcp/{_PORT}"
        self._shard = folder / "shard.txt"
        self._shard.write_text(_TEXT)

    @property
    def _place(self) -> list[str]:
        return ["--home", str(self.home.path)]

    @property
    def _settings(self) -> list[str]:
        return ["--listen", self._listen, "--shard", str(self._shard)]

    def found(self, model: dict[str, Any], changes: dict[str, Any]) -> None:
        """A swarm of this model, with these fields of the manifest."""
        config = self._shard.with_name("config.json")
        config.write_text(json.dumps(model))
        options = [f"--set={name}={value}" for name, value in changes.items()]
        call(["init", *self._place, "--swarm", "overlap", "--privacy", "off", *self._settings,
              "--model-config", str(config), "--tokenizer", "bytes", *options])  # fmt: skip

    def invite(self, other: Peer) -> str:
        """A token for another peer."""
        peer_id = call(["id", *other._place])
        return call(["invite", "create", *self._place, "--for", peer_id])

    def prepare(self, token: str) -> None:
        """Make a home that may join."""
        call(["init", *self._place, "--join", token, *self._settings])

    @contextlib.contextmanager
    def running(self, step_s: float) -> Iterator[None]:
        """The daemon, in its namespace; it and its children are gone when the block ends."""
        module = ["benchmarks.overlap.daemon", str(self.home.path)]
        with ending([self], _END_TIMEOUT_S):
            self.start(module, {STEP_VARIABLE: str(step_s)}, self._inside)
            yield

    def _inside(self, command: Sequence[str]) -> list[str]:
        return ["ip", "netns", "exec", self._namespace, *command]

    def rows(self) -> list[Row]:
        """The trainer's timeline so far."""
        return timeline.read(self.home.path / TIMELINE)

    def wait_until(self, done: Callable[[], object], timeout_s: float = _START_TIMEOUT_S) -> None:
        """Until `done()`. The daemon is asked nothing meanwhile.

        Raises:
            RuntimeError: the daemon died, or it takes too long.
        """
        deadline = time.monotonic() + timeout_s
        while not done():
            self.require_alive(deadline)
            time.sleep(_POLL_S)

    def measure(self, steps: int, timeout_s: float) -> None:
        """Let it take so many whole steps from now on."""
        self.wait_until(self.rows)
        enough = len(self.rows()) + steps + 1
        self.wait_until(lambda: len(self.rows()) > enough, timeout_s)

    def warm_up(self, merges: int) -> None:
        """Let it merge so many times since its start."""
        self.wait_until(lambda: self.rows()[-1].merges >= merges)

    def checkpoint_s(self) -> float:
        """Seconds that a checkpoint takes between two steps; its writing is others' business."""
        before = _unexplained(self.rows()[-1])
        Client(self.home.socket(NodeConfig()), _END_TIMEOUT_S).checkpoint()
        self.measure(1, _END_TIMEOUT_S)
        return _unexplained(self.rows()[-1]) - before


def _unexplained(row: Row) -> float:
    """Between steps, but neither in snapshots nor in merges."""
    return row.boundary - row.snapshot - row.merge
