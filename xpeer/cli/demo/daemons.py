"""Real daemons, started through the public command line. None of them outlives the demo."""

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
    """The processes of one demo. Use `running` as a context: it ends all of them.

    Each process has its own register beside its log, not the machine's: runs that are compared
    train on the same text, and each has its own budget.

    Args:
        logs: folder for their output, for nothing else.
    """

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        logs.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def running(self) -> Iterator[Daemons]:
        """End all processes when the block ends; see `end`."""
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
        """Reap a process that has ended, so that another of its name can start."""
        process = self._processes.pop(name, None)
        if process is not None:
            process.wait(END_TIMEOUT_S)

    def log(self, name: str) -> Path:
        """The file with a process's output."""
        return self._logs / f"{name}.log"

    def wait(self, name: str, timeout_s: float) -> int:
        """Wait for a process to end; returns its exit code."""
        try:
            return self._processes[name].wait(timeout_s)
        except subprocess.TimeoutExpired as e:
            raise LocalTimeoutError(
                f"{name} did not end in {timeout_s:g} s", self._hint(name)
            ) from e

    def check_alive(self) -> None:
        """Check that no process has failed.

        Raises:
            LocalError: one did; it is named with the last line of its log.
        """
        for name, process in self._processes.items():
            if process.poll() not in (None, 0):
                raise LocalError(f"{name} ended with {process.returncode}", self._hint(name))

    def end(self, names: Sequence[str]) -> None:
        """End these processes with SIGTERM, or with SIGKILL if they do not end in END_TIMEOUT_S."""
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
        """End all processes."""
        self.end(list(self._processes))

    def _hint(self, name: str) -> str:
        lines = self.log(name).read_text(errors="replace").strip().splitlines()
        return f"its log {self.log(name)} ends: {lines[-1] if lines else '(empty)'}"


def call(arguments: Sequence[str], settings: Mapping[str, str] | None = None) -> str:
    """Run `xpeer ARGUMENTS` to its end; returns what it printed on stdout.

    Raises:
        LocalError: it failed; has its message.
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
    """The daemon's status; None while it does not answer."""
    try:
        return Client(home.socket(NodeConfig())).status()
    except (NotRunningError, LocalTimeoutError):
        return None


def first_address(daemons: Daemons, name: str, timeout_s: float) -> str:
    """Wait for the address that a bootstrap node prints once it can be reached."""
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
