"""Real daemons through the public command line, and the promise that none of them stays behind."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from xpeer.config import Home, NodeConfig
from xpeer.control import Client
from xpeer.errors import LocalError, LocalTimeoutError, NotRunningError
from xpeer.status import Status

XPEER = (sys.executable, "-m", "xpeer.cli")
END_TIMEOUT_S = 40.0
PR_SET_PDEATHSIG = 1


class Daemons:
    """The processes of one demo. Use as a context: all of them are gone when it ends.

    What each charges to documents is counted beside its log, not in the machine's register: runs
    that are compared train on the same text, and each has the budget of its own.

    Args:
        logs: folder for their output, which nothing else shares.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        logs.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def running(self) -> Iterator[Daemons]:
        """End them all at the end, politely first."""
        try:
            yield self
        finally:
            self.end_all()

    def start(self, name: str, arguments: Sequence[str], settings: Mapping[str, str]) -> None:
        """Start `xpeer ARGUMENTS` in the background."""
        register = {"XPEER_PRIVACY_REGISTER": str(self._logs / f"{name}-register")}
        with self.log(name).open("wb") as log:
            self._processes[name] = subprocess.Popen(  # noqa: S603 - our own command
                [*XPEER, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment({**register, **settings}),
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 - one prctl, before any thread
            )

    def forget(self, name: str) -> None:
        """Reap one that has ended, before another of its name starts."""
        process = self._processes.pop(name, None)
        if process is not None:
            process.wait(END_TIMEOUT_S)

    def log(self, name: str) -> Path:
        """Where its output goes."""
        return self._logs / f"{name}.log"

    def wait(self, name: str, timeout_s: float) -> int:
        """Its exit code."""
        try:
            return self._processes[name].wait(timeout_s)
        except subprocess.TimeoutExpired as e:
            raise LocalTimeoutError(
                f"{name} did not end in {timeout_s:g} s", self._hint(name)
            ) from e

    def check_alive(self) -> None:
        """Nobody died unnoticed.

        Raises:
            LocalError: names the one that did, and shows its last words.
        """
        for name, process in self._processes.items():
            if process.poll() not in (None, 0):
                raise LocalError(f"{name} ended with {process.returncode}", self._hint(name))

    def end(self, names: Sequence[str]) -> None:
        """SIGTERM, wait, and SIGKILL for whoever does not listen."""
        chosen = {name: self._processes[name] for name in names if name in self._processes}
        for process in chosen.values():
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + END_TIMEOUT_S
        for process in chosen.values():
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def end_all(self) -> None:
        """All of them."""
        self.end(list(self._processes))

    def _hint(self, name: str) -> str:
        lines = self.log(name).read_text(errors="replace").strip().splitlines()
        return f"its log {self.log(name)} ends: {lines[-1] if lines else '(empty)'}"


def call(arguments: Sequence[str], settings: Mapping[str, str] | None = None) -> str:
    """Run `xpeer ARGUMENTS` to its end; what it printed.

    Raises:
        LocalError: it failed; carries its message.
    """
    done = subprocess.run(  # noqa: S603 - our own command
        [*XPEER, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=_environment(settings or {}),
        check=False,
    )
    if done.returncode != 0:
        raise LocalError(f"xpeer {arguments[0]}: {done.stderr.strip()[-500:]}")
    return done.stdout.strip()


def status_of(home: Home) -> Status | None:
    """What the daemon says; None while it does not answer."""
    try:
        return Client(home.socket(NodeConfig())).status()
    except (NotRunningError, LocalTimeoutError):
        return None


def first_address(daemons: Daemons, name: str, timeout_s: float) -> str:
    """The address that a bootstrap node prints once it can be reached."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        daemons.check_alive()
        for line in daemons.log(name).read_text(errors="replace").splitlines():
            if line.startswith("{"):
                return str(json.loads(line)["addresses"][0])
        time.sleep(0.1)
    raise LocalTimeoutError(f"{name} printed no address in {timeout_s:g} s")


def _environment(settings: Mapping[str, str]) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("XPEER_")}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **settings}


def _die_with_parent() -> None:
    """If the demo is killed with -9, the kernel ends its daemons."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
