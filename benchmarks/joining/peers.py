"""Members of one swarm, each on a host of its own: founded, invited and asked by the public command
line.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks.exchange.hosts import Host
from benchmarks.joining.figures import PIECES, TIMELINE, Came, Row, read
from xpeer.cli.demo.daemons import call, status_of
from xpeer.config import Home
from xpeer.status import Status

_ROOT = Path(__file__).parents[2]
"""The trainer process does not look for modules where it was started."""
_PORT: Final = 4001
_END_TIMEOUT_S: Final = 120.0
_POLL_S: Final = 0.25


class Peer:
    """A daemon on a host of its own.

    Args:
        folder: of all peers.
        name: its own.
        host: where it runs.
        text: its shard.
        tokenizer: folder of the model's tokenizer; None = bytes.
    """

    def __init__(
        self, folder: Path, name: str, host: Host, text: str, tokenizer: Path | None
    ) -> None:
        self.name, self.host = name, host
        self.home = Home(folder / name)
        shard = folder / f"{name}.txt"
        shard.write_text(text, encoding="utf-8")
        listen = f"/ip4/{host.address}/tcp/{_PORT}"
        self._settings = ["--shard", str(shard), "--listen", listen]
        if tokenizer is not None:
            self._settings += ["--tokenizer", str(tokenizer)]
        self._log = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def _place(self) -> list[str]:
        return ["--home", str(self.home.path)]

    def found(self, options: list[str]) -> None:
        """A swarm; `options` are those of `xpeer init` that all members share."""
        call(["init", *self._place, "--swarm", "joining", *self._settings, *options])

    def prepare(self, founder: Peer) -> None:
        """Make a home that may join the founder's swarm."""
        peer_id = call(["id", *self._place])
        address = founder.wait(lambda s: bool(s.addresses)).addresses[0]
        token = call(["invite", "create", *founder._place, "--for", peer_id, "--seed", address])
        call(["init", *self._place, "--join", token, *self._settings])

    def start(self, min_peers: int, *, compile_codec: bool) -> None:
        """The daemon, in its namespace."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("XPEER_")}
        path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        own = {
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "XPEER_TRAINING_THREADS": "1",
            "XPEER_TRAINING_MICRO_BATCH": "1",
            "XPEER_TRAINING_MIN_PEERS": str(min_peers),
            "XPEER_TRAINING_COMPILE_CODEC": str(int(compile_codec)),
            "XPEER_TRAINING_VALIDATION_RECORDS": "4",
            "XPEER_CHECKPOINT_EVERY_S": "86400",
            "XPEER_PRIVACY_REGISTER": str(self.home.path / "register"),
        }
        daemon = [sys.executable, "-m", "benchmarks.joining.daemon", str(self.home.path)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self.host.inside(daemon),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**kept, **own},
            )

    def kill(self) -> None:
        """As by the out-of-memory killer."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        """End it, if it runs."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def wait(self, done: Callable[[Status], bool], timeout_s: float = 1800.0) -> Status:
        """Until its status is so.

        Raises:
            RuntimeError: the daemon died, or it takes too long.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            status = status_of(self.home)
            if status is not None and done(status):
                return status
            assert self._process is not None
            if self._process.poll() is not None or time.monotonic() > deadline:
                log = self._log.read_text(errors="replace")[-3000:]
                raise RuntimeError(f"{self.name} died or takes too long; its log ends:\n{log}")
            time.sleep(_POLL_S)

    def wait_for_rows(self, enough: Callable[[list[Row]], bool]) -> None:
        """Until its trainer's timeline is so."""
        self.wait(lambda _: enough(self.rows()))

    def rows(self) -> list[Row]:
        """The trainer's timeline so far."""
        return read(self.home.path / TIMELINE, Row)

    def came(self) -> list[Came]:
        """Offers that it asked for, and pieces that came."""
        return read(self.home.path / PIECES, Came)


def take_steps(peers: list[Peer], steps: int) -> None:
    """Let each take so many whole steps from now on."""
    goals = [len(peer.rows()) + steps + 1 for peer in peers]
    for peer, goal in zip(peers, goals, strict=True):
        peer.wait_for_rows(partial(_has, goal))


def _has(count: int, rows: list[Row]) -> bool:
    return len(rows) >= count


@contextlib.contextmanager
def ending(peers: list[Peer]) -> Iterator[None]:
    """All are gone when the block ends."""
    try:
        yield
    finally:
        for peer in peers:
            peer.end()
