"""The daemon's control socket: the types of its answers, and the client.

HTTP over a Unix socket, standard library only, so that `xpeer status` is quick. The daemon's side
is `xpeer_daemon.api`. The socket's owner, group and mode alone decide who may connect.
"""

from __future__ import annotations

import http.client
import os
import select
import socket
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeVar

import msgspec
from msgspec import Struct

from xpeer.errors import (
    ConfigError,
    ExitCode,
    LocalError,
    LocalTimeoutError,
    NotAuthorisedError,
    NotRunningError,
    NotSavedError,
)
from xpeer.leaves import Local, Parts, Public, Timing, seen_by
from xpeer.paths import IMPOSSIBLE, unreachable
from xpeer.status import SCHEMA_VERSION, Partner, Status

API = "/v1"
MAX_ANSWER_BYTES = 16 << 20
_POLL_S = 0.1
_HOW_TO_REACH = "start it with `xpeer start`, or name its folder with --home or XPEER_HOME"


@seen_by("node")
class Versioned(Struct, frozen=True, kw_only=True):
    """Base of every answer. The client checks the version before it reads the rest."""

    schema_version: Public[int] = SCHEMA_VERSION


@seen_by("node")
class Peers(Versioned, frozen=True, kw_only=True):
    """Answer of GET /v1/peers."""

    peers: Parts[list[Partner]]


@seen_by("node")
class Version(Versioned, frozen=True, kw_only=True):
    """Answer of GET /v1/version."""

    version: Public[str]
    pid: Public[int]


@seen_by("node")
class Done(Versioned, frozen=True, kw_only=True):
    """Answer of every POST."""

    pid: Public[int]
    path: Public[str] = ""
    """Path of the checkpoint that was written; "" after other requests."""
    state: Timing[str] = ""
    """State of the node after pause and resume; "" after other requests."""


@seen_by("node")
class End(Versioned, frozen=True, kw_only=True):
    """Answer of GET /v1/end: how far the daemon has come with ending.

    The daemon answers after a moment, or as soon as it is done.
    """

    over: Timing[bool]
    """True iff only the exit of the process is still to come."""
    written: Timing[int] = 0
    """Bytes of the last checkpoint that are written."""
    total: Timing[int] = 0
    """Bytes that it will have; 0 = it is not being written."""
    problem: Local[str] = ""
    """What was not saved; "" = nothing is lost."""
    remedy: Timing[str] = ""
    exit_code: Timing[int] = int(ExitCode.OK)


@seen_by("node")
class Problem(Versioned, frozen=True, kw_only=True):
    """Answer of a request that the daemon could not fulfil."""

    problem: Local[str]
    remedy: Local[str] = ""
    exit_code: Local[int] = int(ExitCode.ERROR)


Answer = Status | Peers | Version | Done | End


@dataclass(frozen=True, slots=True)
class Route:
    """A question to the daemon, or an order.

    Attributes:
        method: of HTTP; a GET changes nothing.
        answer: what comes back.
        is_slow: whether it waits for the trainer, which may be in a step of minutes. The client
            then waits for as long as the daemon answers other questions.
    """

    method: Literal["GET", "POST"]
    answer: type[Answer]
    is_slow: bool = False


ROUTES: Final[Mapping[str, Route]] = {
    "status": Route("GET", Status),
    "peers": Route("GET", Peers),
    "version": Route("GET", Version),
    "end": Route("GET", End),
    "pause": Route("POST", Done, is_slow=True),
    "resume": Route("POST", Done, is_slow=True),
    "stop": Route("POST", Done),
    "leave": Route("POST", Done),
    "checkpoint": Route("POST", Done, is_slow=True),
}
"""Everything that the socket answers, by path below `API`. In the daemon `xpeer_daemon.commands`
has a method for each. There is no other API, page or port for metrics."""

A = TypeVar("A", bound=Struct)


class Client:
    """Client of one daemon; it opens a connection for each request.

    Every method raises:
        NotRunningError: nobody answers on the socket.
        LocalTimeoutError: the daemon did not answer in time.
        NotAuthorisedError: this user may not open the socket.
        ConfigError: no socket can be at its path.
        LocalError: the daemon can't do it, or answers in another schema.

    Args:
        path: the control socket.
        timeout_s: for connecting, and for each read of the answer.
    """

    def __init__(self, path: Path, timeout_s: float = 10.0) -> None:
        self.path = path
        self.timeout_s = timeout_s

    def status(self) -> Status:
        """Everything the node says of itself."""
        return self.ask("status", Status)

    def peers(self) -> list[Partner]:
        """The members of the swarm as the node sees them."""
        return self.ask("peers", Peers).peers

    def version(self) -> Version:
        """The daemon's version and pid."""
        return self.ask("version", Version)

    def pause(self) -> str:
        """Have the node take no steps and no exchanges until `resume`; returns its state."""
        return self.ask("pause", Done).state

    def resume(self) -> str:
        """Undo `pause`; returns the node's state."""
        return self.ask("resume", Done).state

    def checkpoint(self) -> str:
        """Have the node write a checkpoint now.

        Returns:
            Its path on the daemon's side; "" if there is no trainer.
        """
        return self.ask("checkpoint", Done).path

    def stop(self, *, leave: bool = False) -> int:
        """Ask the daemon to end, and return its pid at once.

        Args:
            leave: the daemon first announces that this node is gone for good.
        """
        return self.ask("leave" if leave else "stop", Done).pid

    def stop_and_wait(self, timeout_s: float, *, leave: bool = False, patient: bool = False) -> int:
        """Ask the daemon to end, wait until the process is gone, and return its pid.

        Args:
            timeout_s: how long to wait.
            leave: as for `stop`.
            patient: start the timeout again whenever the daemon says that it is still ending.

        Raises:
            LocalTimeoutError: it still runs after `timeout_s`.
            NotSavedError: it is gone, and lost steps or did not say whether it did.
        """
        # Ask for the pid before the request: afterwards it could be another process's.
        pid = self.version().pid
        process = _open_pid(pid)
        try:
            self.stop(leave=leave)
            end, left_s = self._follow_end(timeout_s, patient=patient)
            gone = (
                _await_exit(process, left_s) if process is not None else self._await_silence(left_s)
            )
        finally:
            if process is not None:
                os.close(process)
        if not gone:
            raise LocalTimeoutError(
                f"the daemon (pid {pid}) still runs after {timeout_s:g} s",
                "it may be writing a checkpoint: see `xpeer logs`, or wait longer with --timeout",
            )
        if end is not None and end.problem:
            raise NotSavedError(end.problem, end.remedy)
        if end is not None and not end.over:
            raise NotSavedError(
                f"the daemon (pid {pid}) is gone, and did not say that its steps are saved",
                "see `xpeer logs`; its next start says from which step it goes on",
            )
        return pid

    def _follow_end(self, timeout_s: float, *, patient: bool) -> tuple[End | None, float]:
        """Follow the daemon until it is done or the time is over.

        Returns:
            Its last answer, None if it knows no such request; seconds that remain of the timeout.
        """
        deadline = time.monotonic() + timeout_s
        last = None
        while time.monotonic() < deadline:
            try:
                last = self.ask("end", End)
            except LocalTimeoutError:
                continue
            except NotRunningError:  # it is gone; one that ends well stays until we have heard it
                last = last or End(over=False)
                break
            except LocalError:  # of a version that has no such request
                break
            if last.over:
                break
            if patient:
                deadline = time.monotonic() + timeout_s
            time.sleep(_POLL_S)
        return last, max(0.0, deadline - time.monotonic())

    def _await_silence(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            try:
                self.version()
            except NotRunningError:
                return True
            time.sleep(_POLL_S)
        return False

    def ask(self, route: str, answer: type[A]) -> A:
        """The daemon's answer to a route of `ROUTES`; see the class for what it raises."""
        connection = _UnixConnection(self.path, self.timeout_s)
        try:
            connection.request(ROUTES[route].method, f"{API}/{route}")
            if ROUTES[route].is_slow:
                self._await_answer(connection)
            response = connection.getresponse()
            body = response.read(MAX_ANSWER_BYTES)
        except (FileNotFoundError, ConnectionError) as e:
            raise NotRunningError(f"no daemon answers at {self.path}", _HOW_TO_REACH) from e
        except TimeoutError as e:
            raise LocalTimeoutError(
                f"the daemon at {self.path} did not answer within {self.timeout_s:g} s",
                "see `xpeer logs`; if it hangs, systemd's watchdog or `kill` ends it",
            ) from e
        except PermissionError as e:
            raise NotAuthorisedError(
                f"you may not open the control socket {self.path}",
                "join the socket's group (`usermod -aG xpeer YOU`), or use sudo",
            ) from e
        except (OSError, http.client.HTTPException) as e:
            if isinstance(e, OSError) and e.errno in IMPOSSIBLE:
                raise unreachable("daemon.socket", self.path, e) from e
            raise LocalError(
                f"the control socket {self.path} failed: {e or type(e).__name__}",
                "check daemon.socket; see `xpeer logs`",
            ) from e
        finally:
            connection.close()
        if response.status == http.HTTPStatus.OK:
            return self._read(body, answer)
        raise self._refusal(response.status, body)

    def _await_answer(self, connection: http.client.HTTPConnection) -> None:
        """Wait until an answer begins, or the daemon does not even say its version any more."""
        while not select.select([connection.sock], [], [], self.timeout_s)[0]:
            self.version()

    def _refusal(self, status: int, body: bytes) -> LocalError:
        if status == http.HTTPStatus.NOT_FOUND:
            return LocalError(
                f"the daemon at {self.path} is of another version",
                "restart it after an update, or use its own `xpeer`",
            )
        if status == http.HTTPStatus.INTERNAL_SERVER_ERROR:
            return LocalError("the daemon failed on this request", "see `xpeer logs`")
        answer = self._read(body, Problem)
        error = LocalError(answer.problem, answer.remedy)
        if answer.exit_code in set(ExitCode):
            error.exit_code = ExitCode(answer.exit_code)
        return error

    def _read(self, body: bytes, kind: type[A]) -> A:
        try:
            seen = msgspec.json.decode(body, type=Versioned).schema_version
            if seen == SCHEMA_VERSION:
                return msgspec.json.decode(body, type=kind)
        except (msgspec.MsgspecError, ValueError, RecursionError) as e:
            raise LocalError(
                f"what answers at {self.path} is no xpeer daemon of this version: {e}",
                "check daemon.socket",
            ) from e
        raise LocalError(
            f"the daemon answers in schema {seen}, this `xpeer` reads {SCHEMA_VERSION}",
            "restart the daemon after an update, or use its own `xpeer`",
        )


def socket_is_there(path: Path) -> bool:
    """Whether there is a control socket, even one that nobody answers on.

    Raises:
        ConfigError: the path can't be used, or is no socket.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return False
    except OSError as e:
        raise unreachable("daemon.socket", path, e) from e
    if not stat.S_ISSOCK(mode):
        raise ConfigError(
            f"daemon.socket: {path} exists and is not a socket", "remove it or set another path"
        )
    return True


class _UnixConnection(http.client.HTTPConnection):
    """An HTTP connection whose address is a path."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Open the socket; http.client calls this on the first request."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _open_pid(pid: int) -> int | None:
    """A handle on a process; None where there is none (no Linux, another pid namespace)."""
    try:
        return os.pidfd_open(pid)
    except (OSError, AttributeError):
        return None


def _await_exit(process: int, timeout_s: float) -> bool:
    poller = select.poll()
    poller.register(process, select.POLLIN)
    return bool(poller.poll(timeout_s * 1000))
