"""Daemons of a benchmark's swarm: each is a process with a home and a log of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from xpeer.cli.demo.daemons import status_of
from xpeer.config import Home
from xpeer.status import Status

_ROOT: Final = Path(__file__).parents[1]
"""A trainer process does not look for modules where it was started."""
_POLL_S: Final = 0.25
_LAST_WORDS: Final = 3000
"""Characters of a log that an error shows."""


class Daemon:
    """One daemon. It has a register of its own, and one thread.

    Args:
        folder: of all daemons.
        name: its own.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self.home = name, Home(folder / name)
        self._register, self._log = folder / f"register-{name}", folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(
        self,
        module: Sequence[str],
        settings: Mapping[str, str],
        inside: Callable[[Sequence[str]], list[str]] = list,
    ) -> None:
        """Run a module.

        Args:
            module: its name, and its arguments.
            settings: variables.
            inside: makes of a command one that runs on a host of its own.
        """
        kept = {key: value for key, value in os.environ.items() if not key.startswith("XPEER_")}
        path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        own = {
            "PYTHONPATH": path,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "XPEER_TRAINING_THREADS": "1",
            "XPEER_PRIVACY_REGISTER": str(self._register),
        }
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                inside([sys.executable, "-m", *module]),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**kept, **own, **settings},
            )

    @property
    def started(self) -> bool:
        """Whether it was ever started."""
        return self._process is not None

    def kill(self) -> None:
        """As by the out-of-memory killer."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def status(self) -> Status | None:
        """What it says of itself; None while it does not answer."""
        return status_of(self.home)

    def wait(self, done: Callable[[Status], bool], timeout_s: float) -> Status:
        """Until its status is so.

        Raises:
            RuntimeError: the daemon died, or it takes too long.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            status = self.status()
            if status is not None and done(status):
                return status
            self.require_alive(deadline)
            time.sleep(_POLL_S)

    def require_alive(self, deadline: float) -> None:
        """Check that it lives, and that there is time left.

        Args:
            deadline: by the monotonic clock.

        Raises:
            RuntimeError: it died, or takes too long; has the end of its log.
        """
        dead = self._process is None or self._process.poll() is not None
        if dead or time.monotonic() > deadline:
            log = self._log.read_text(errors="replace")[-_LAST_WORDS:]
            raise RuntimeError(f"{self.name} died or takes too long; its log ends:\n{log}")

    def _ask_to_end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def _wait_for_end(self, timeout_s: float) -> None:
        if self._process is None:
            return
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()


@contextlib.contextmanager
def ending(daemons: Iterable[Daemon], timeout_s: float) -> Iterator[None]:
    """All are gone when the block ends; those that take longer are killed."""
    try:
        yield
    finally:
        for daemon in daemons:
            daemon._ask_to_end()
        for daemon in daemons:
            daemon._wait_for_end(timeout_s)
