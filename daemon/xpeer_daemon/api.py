"""The control API: HTTP with versioned JSON on a Unix socket, for `xpeer` and for programs.

The API knows the node only as a `ControlledNode`. The socket's owner, group and mode (0660) are all
the authentication that there is. Whoever may open the socket may stop the node and read its losses,
so it is never on a network.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from xpeer.control import API, ROUTES, Problem, socket_is_there
from xpeer.errors import ConfigError, ExitCode, LocalError, PeerError
from xpeer.escape import visible
from xpeer_daemon.commands import Commands, ControlledNode

log = logging.getLogger("xpeer.api")

SOCKET_MODE = 0o660
MAX_REQUEST_BYTES = 4096
GRACE_S = 2.0
"""When the API closes, open requests have this long to finish."""


class ControlApi:
    """A running API. `start` makes one."""

    def __init__(self, runner: web.AppRunner, path: Path, inode: int | None) -> None:
        self._runner = runner
        self._path = path
        self._inode = inode

    @classmethod
    async def start(cls, path: Path, subject: ControlledNode) -> ControlApi:
        """Listen on the socket.

        Args:
            path: of the socket. A socket that a dead daemon left behind is replaced.
            subject: the node.

        Raises:
            LocalError: another daemon answers there.
            ConfigError: the path can't be used.
        """
        listener = _listen(path)
        runner = web.AppRunner(_application(subject), access_log=None, shutdown_timeout=GRACE_S)
        api = cls(runner, path, _inode(path))
        try:
            await runner.setup()
            await web.SockSite(runner, listener).start()
        except BaseException:
            listener.close()
            await api.close()
            raise
        log.debug("control socket %s", path)
        return api

    async def close(self) -> None:
        """Finish open requests, stop listening, and remove the socket if it is still ours."""
        await self._runner.cleanup()
        if self._inode is not None and _inode(self._path) == self._inode:
            self._path.unlink(missing_ok=True)


def _application(node: ControlledNode) -> web.Application:
    commands = Commands(node)
    app = web.Application(middlewares=[_report_errors], client_max_size=MAX_REQUEST_BYTES)
    for name, route in ROUTES.items():
        app.router.add_route(route.method, f"{API}/{name}", _handler(getattr(commands, name)))
    return app


def _handler(ask: Callable[[], Awaitable[msgspec.Struct]]) -> Handler:
    async def handler(_request: web.Request) -> web.StreamResponse:
        return _json(await ask())

    return handler


@web.middleware
async def _report_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer an error that we raise on purpose with a `Problem`, any other with a 500."""
    try:
        return await handler(request)
    except LocalError as e:
        problem, remedy = visible(e.problem), visible(e.remedy)
        return _json(Problem(problem=problem, remedy=remedy, exit_code=int(e.exit_code)), 409)
    except PeerError as e:
        return _json(Problem(problem=visible(str(e)), exit_code=int(ExitCode.ERROR)), 502)


def _json(answer: msgspec.Struct, status: int = 200) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(answer), status=status, content_type="application/json"
    )


def _listen(path: Path) -> socket.socket:
    """A listening socket. At no moment can others than its owner and group open it."""
    _clear(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o177)
    try:
        listener.bind(str(path))
        listener.listen()
        path.chmod(SOCKET_MODE)
    except OSError as e:
        listener.close()
        raise ConfigError(
            f"daemon.socket: can't listen on {path}: {e.strerror}",
            "its folder must exist and belong to the daemon's user",
        ) from e
    finally:
        os.umask(previous)
    return listener


def _inode(path: Path) -> int | None:
    try:
        return path.lstat().st_ino
    except FileNotFoundError:
        return None


def _clear(path: Path) -> None:
    """Remove a socket that a dead daemon left behind.

    Raises:
        LocalError: another daemon answers on it.
        ConfigError: the path can't be used, or is no socket.
    """
    if not socket_is_there(path):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            log.info("removed the socket %s of a daemon that is gone", path)
            return
        except OSError:
            pass  # it is busy, or not ours: another daemon has it
    raise LocalError(
        f"another daemon answers at {path}", "stop it with `xpeer stop`, or set daemon.socket"
    )
