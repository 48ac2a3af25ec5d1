"""Members of one swarm, each on a host of its own: founded, invited and asked by the public command
line.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks.daemons import Daemon
from benchmarks.exchange.hosts import Host
from benchmarks.joining.figures import PIECES, TIMELINE, Came, Row, read
from xpeer.cli.demo.daemons import call
from xpeer.status import Status

END_TIMEOUT_S: Final = 120.0
WAIT_S: Final = 1800.0
_PORT: Final = 4001


class Peer(Daemon):
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
        super().__init__(folder, name)
        self.host = host
        shard = folder / f"{name}.txt"
        shard.write_text(text, encoding="utf-8")
        listen = f"/ip4/{host.address}/tcp/{_PORT}"
        self._settings = ["--shard", str(shard), "--listen", listen]
        if tokenizer is not None:
            self._settings += ["--tokenizer", str(tokenizer)]

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

    def run(self, min_peers: int, *, compile_codec: bool) -> None:
        """Start the daemon, in its namespace."""
        settings = {
            "XPEER_TRAINING_MICRO_BATCH": "1",
            "XPEER_TRAINING_MIN_PEERS": str(min_peers),
            "XPEER_TRAINING_COMPILE_CODEC": str(int(compile_codec)),
            "XPEER_TRAINING_VALIDATION_RECORDS": "4",
            "XPEER_CHECKPOINT_EVERY_S": "86400",
        }
        module = ["benchmarks.joining.daemon", str(self.home.path)]
        self.start(module, settings, self.host.inside)

    def wait(self, done: Callable[[Status], bool], timeout_s: float = WAIT_S) -> Status:
        """See `Daemon.wait`."""
        return super().wait(done, timeout_s)

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
