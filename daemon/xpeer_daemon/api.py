"""The control API: HTTP with versioned JSON on a Unix socket, for `xpeer` and for programs.

Knows the node only as a `ControlledNode`. There is no authentication beyond the socket's owner,
group and mode (0660): whoever may open it may stop the node and read its losses, so it is never on
a network.
"""

from __future__ import annotations

import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from xpeer.control import API, ROUTES, Problem
from xpeer.errors import ConfigError, ExitCode, LocalError, PeerError
from xpeer.escape import visible
from xpeer_daemon.commands import Commands, ControlledNode

log = logging.getLogger("xpeer.api")

SOCKET_MODE = 0o660
MAX_REQUEST_BYTES = 4096
GRACE_S = 2.0
"""Open requests get this long when the API closes."""


class ControlApi:
    """A running API. Make with `start`."""

    def __init__(self, runner: web.AppRunner, path: Path, inode: int | None) -> None:
        self._runner = runner
        self._path = path
        self._inode = inode

    @classmethod
    async def start(cls, path: Path, subject: ControlledNode) -> ControlApi:
        """Listen.

        Args:
            path: of the socket; one left over by a dead daemon is replaced.
            subject: the node.

        Raises:
            LocalError: somebody answers there already.
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
        """Answer what is open, stop listening, remove the socket if it is still ours."""
        await self._runner.cleanup()
        if self._inode is not None and _inode(self._path) == self._inode:
            self._path.unlink(missing_ok=True)


def _application(node: ControlledNode) -> web.Application:
    commands = Commands(node)
    app = web.Application(middlewares=[_explain], client_max_size=MAX_REQUEST_BYTES)
    for name, route in ROUTES.items():
        app.router.add_route(route.method, f"{API}/{name}", _answering(getattr(commands, name)))
    return app


def _answering(ask: Callable[[], Awaitable[msgspec.Struct]]) -> Handler:
    async def handler(_request: web.Request) -> web.StreamResponse:
        return _json(await ask())

    return handler


@web.middleware
async def _explain(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Errors that we raise on purpose travel as `Problem`; others are a 500 and a traceback."""
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
    """A listening socket that only its owner and group can ever open."""
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
    """Remove what a dead daemon left; refuse anything else."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as e:
        raise ConfigError(
            f"daemon.socket: {path} can't be used: {e.strerror}", "check its folder's owner"
        ) from e
    if not stat.S_ISSOCK(mode):
        raise ConfigError(
            f"daemon.socket: {path} exists and is not a socket", "remove it or set another path"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            log.info("removed the socket %s of a daemon that is gone", path)
            return
        except OSError:
            pass  # busy or not ours: somebody holds it
    raise LocalError(
        f"another daemon answers at {path}", "stop it with `xpeer stop`, or set daemon.socket"
    )
