"""The client of the control socket against the real API, and every way an answer can be missing."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.fake_daemon import HEALTHY, answering
from xpeer import __version__
from xpeer.control import Client, Version
from xpeer.errors import (
    BudgetSpentError,
    ExitCode,
    LocalError,
    LocalTimeoutError,
    NotAuthorisedError,
    NotRunningError,
    NotSavedError,
    PeerError,
    Reason,
)

ROOT = Path(__file__).parents[2]


@contextmanager
def raw_server(path: Path, answer: bytes | None) -> Iterator[None]:
    """Sends these bytes to one client; None: accepts and stays silent until the end."""
    done = threading.Event()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                if answer is None:
                    done.wait(30)
                else:
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def http(body: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@contextmanager
def process(path: Path, *args: str) -> Iterator[subprocess.Popen[str]]:
    """The fake daemon as a process of its own."""
    command = [sys.executable, "-m", "tests.fake_daemon", str(path), *args]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
        try:
            assert running.stdout is not None
            assert running.stdout.readline() == "ready\n"
            yield running
        finally:
            running.kill()


def test_answers_are_what_the_daemon_said(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with answering(path) as node:
        client = Client(path)
        assert client.status() == HEALTHY
        assert client.peers() == HEALTHY.partners
        assert client.version().pid == os.getpid()
        assert client.version().version == __version__
        client.pause()
        client.resume()
        assert client.checkpoint() == "/checkpoints/240"
        assert client.stop() == os.getpid()
        client.stop(leave=True)
        calls = [call for call in node.calls if call != "status"]
        assert calls == ["pause", "resume", "checkpoint", "stop", "leave"]
        assert node.followed == [True, True]


def test_errors_keep_their_exit_code_and_remedy(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with answering(path) as node:
        node.error = BudgetSpentError("the budget is spent", "raise epsilon")
        with pytest.raises(LocalError, match="the budget is spent - raise epsilon") as caught:
            Client(path).resume()
        assert caught.value.exit_code == ExitCode.BUDGET_SPENT
        node.error = PeerError(Reason.UNREACHABLE, "nobody")
        with pytest.raises(LocalError, match="unreachable: nobody") as caught:
            Client(path).pause()
        assert caught.value.exit_code == ExitCode.ERROR


def test_a_bug_in_the_daemon_is_not_hidden(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "s"
    with answering(path) as node:
        node.error = ZeroDivisionError("secret detail")
        with pytest.raises(LocalError, match="failed on this request") as caught:
            Client(path).pause()
    assert "secret detail" not in str(caught.value)
    assert "ZeroDivisionError" in caplog.text


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(NotRunningError, match="xpeer start"):
        Client(tmp_path / "s").status()


def test_left_over_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    with pytest.raises(NotRunningError):
        Client(path).status()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open every socket")
def test_forbidden_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with answering(path):
        path.chmod(0)
        with pytest.raises(NotAuthorisedError, match="group"):
            Client(path).status()


def test_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(NotAuthorisedError, match="group"):
        Client(tmp_path / "s").status()


def test_silent_daemon(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with raw_server(path, None), pytest.raises(LocalTimeoutError, match=r"within 0\.1 s"):
        Client(path, timeout_s=0.1).status()


def test_a_slow_answer_is_waited_for_while_the_daemon_answers(tmp_path: Path) -> None:
    """A step may take minutes, and a checkpoint waits for its end."""
    asked = threading.Event()

    class Asking(Client):
        questions = 0

        def version(self) -> Version:
            self.questions += 1
            if self.questions == 3:
                asked.set()
            return super().version()

    async def save() -> str:
        assert await asyncio.to_thread(asked.wait, 30)
        return "/checkpoints/7"

    with answering(tmp_path / "s") as node:
        node.checkpoint = save  # type: ignore[method-assign]
        assert Asking(tmp_path / "s", timeout_s=0.2).checkpoint() == "/checkpoints/7"


@pytest.mark.parametrize("order", ["pause", "resume", "checkpoint"])
def test_a_daemon_that_answers_nothing_is_not_waited_for(tmp_path: Path, order: str) -> None:
    path = tmp_path / "s"
    with raw_server(path, None), pytest.raises(LocalTimeoutError, match=r"within 0\.1 s"):
        getattr(Client(path, timeout_s=0.1), order)()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (http(b'{"schema_version":99,"whatever":1}'), "schema 99"),
        (http(b'{"schema_version":2,"health":"splendid"}'), "no xpeer daemon of this version"),
        (http(b"<html>"), "no xpeer daemon"),
        (http(b"", "404 Not Found"), "another version"),
        (b"SSH-2.0-x\r\n", "failed"),
        (http(b"{}")[:-2], "truncated"),
    ],
)
def test_what_is_no_daemon_of_ours(tmp_path: Path, answer: bytes, message: str) -> None:
    path = tmp_path / "s"
    with raw_server(path, answer), pytest.raises(LocalError, match=message):
        Client(path).status()


def test_closed_without_an_answer(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with raw_server(path, b""), pytest.raises(NotRunningError):
        Client(path).status()


@pytest.mark.parametrize("pidfd", [True, False])
def test_stop_waits_for_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pidfd: bool
) -> None:
    if not pidfd:  # as on another kernel, or from another pid namespace
        monkeypatch.delattr(os, "pidfd_open")
    path = tmp_path / "s"
    with process(path) as running:
        assert Client(path).stop_and_wait(20) == running.pid
        assert running.wait(20) == 0
    assert not path.exists()


@pytest.mark.parametrize("pidfd", [True, False])
def test_a_daemon_that_is_killed_before_its_first_word_has_not_said_that_all_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pidfd: bool
) -> None:
    """The first question stays open for two seconds: out of memory may come sooner."""
    if not pidfd:
        monkeypatch.delattr(os, "pidfd_open")
    path = tmp_path / "s"
    with process(path, "killed"), pytest.raises(NotSavedError, match="did not say"):
        Client(path).stop_and_wait(20)


@pytest.mark.parametrize("pidfd", [True, False])
def test_stop_gives_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pidfd: bool) -> None:
    if not pidfd:
        monkeypatch.delattr(os, "pidfd_open")
    path = tmp_path / "s"
    with (
        process(path, "deaf") as running,
        pytest.raises(LocalTimeoutError, match=f"pid {running.pid}"),
    ):
        Client(path).stop_and_wait(0.2)
