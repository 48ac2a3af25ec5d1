"""The daemon's control API: HTTP over a Unix socket that only its owner and group can use."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol

import msgspec
from aiohttp import web

from xpeer.control import API
from xpeer.errors import LocalError, PeerError
from xpeer.status import Status

SOCKET_MODE = 0o660


class Subject(Protocol):
    """What the API controls; `node.Node` in production."""

    def status(self) -> Status:
        """Everything."""

    async def pause(self) -> None:
        """Take no steps and no exchanges."""

    async def resume(self) -> None:
        """Undo pause."""

    def request_stop(self, *, leave: bool) -> None:
        """Stop soon."""

    async def checkpoint(self) -> str:
        """Write one; its path."""


class ControlApi:
    """Serves one node. Start with `start`, end with `close`."""

    def __init__(self, path: Path, subject: Subject) -> None:
        self._path = path
        self._subject = subject
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Listen.

        Raises:
            LocalError: another program listens on this path, or it can't be made.
        """
        application = web.Application(middlewares=[_errors])
        application.router.add_get(f"{API}/status", self._status)
        for name, action in self._actions().items():
            application.router.add_post(f"{API}/{name}", _acting(action))
        self._runner = web.AppRunner(application, access_log=None)
        await self._runner.setup()
        try:
            remove_stale(self._path)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            await web.UnixSite(self._runner, str(self._path)).start()
            self._path.chmod(SOCKET_MODE)
        except OSError as e:
            await self._runner.cleanup()
            raise LocalError(
                f"daemon.socket: can't listen on {self._path}: {e}", "check its folder's rights"
            ) from e

    async def close(self) -> None:
        """Stop listening and remove the socket."""
        if self._runner is not None:
            await self._runner.cleanup()
        self._path.unlink(missing_ok=True)

    def _actions(self) -> dict[str, Callable[[], Awaitable[dict[str, str]]]]:
        subject = self._subject

        async def pause() -> dict[str, str]:
            await subject.pause()
            return {}

        async def resume() -> dict[str, str]:
            await subject.resume()
            return {}

        async def stop() -> dict[str, str]:
            subject.request_stop(leave=False)
            return {}

        async def leave() -> dict[str, str]:
            subject.request_stop(leave=True)
            return {}

        async def checkpoint() -> dict[str, str]:
            return {"path": await subject.checkpoint()}

        return {
            "pause": pause, "resume": resume, "stop": stop, "leave": leave,
            "checkpoint": checkpoint,
        }  # fmt: skip

    async def _status(self, _: web.Request) -> web.Response:
        return _json(self._subject.status())


def remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens on.

    Raises:
        OSError: somebody does, or it is no socket.
    """
    if not path.is_socket():
        return
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise OSError(f"another program answers on {path}")


def _acting(
    action: Callable[[], Awaitable[dict[str, str]]],
) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(_: web.Request) -> web.Response:
        return _json(await action())

    return handle


@web.middleware
async def _errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except LocalError as e:
        return _json({"error": e.problem, "remedy": e.remedy}, status=409)
    except PeerError as e:
        return _json({"error": str(e), "remedy": ""}, status=409)


def _json(value: Status | dict[str, str], status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(value), status=status, content_type="application/json"
    )
