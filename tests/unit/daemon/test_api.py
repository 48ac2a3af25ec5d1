"""The control socket as a file: its mode, left-over sockets, and its end."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import aiohttp
import pytest

from tests.fake_daemon import FakeNode
from xpeer.errors import ConfigError, LocalError
from xpeer_daemon.api import ControlApi


async def get(path: Path, what: str, method: str = "GET") -> int:
    connector = aiohttp.UnixConnector(str(path))
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.request(method, f"http://localhost{what}") as response,
    ):
        return response.status


async def test_only_owner_and_group_may_open_it(tmp_path: Path) -> None:
    api = await ControlApi.start(tmp_path / "s", FakeNode())
    try:
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o660
    finally:
        await api.close()
    assert not (tmp_path / "s").exists()


async def test_what_does_not_exist(tmp_path: Path) -> None:
    api = await ControlApi.start(tmp_path / "s", FakeNode())
    try:
        assert await get(tmp_path / "s", "/v1/version") == 200
        assert await get(tmp_path / "s", "/v2/version") == 404
        assert await get(tmp_path / "s", "/v1/stop") == 405  # a link must not stop a node
        assert await get(tmp_path / "s", "/v1/status", "POST") == 405
    finally:
        await api.close()


async def test_a_dead_daemons_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    api = await ControlApi.start(path, FakeNode())
    try:
        assert await get(path, "/v1/version") == 200
    finally:
        await api.close()


async def test_a_living_daemons_socket_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s"
    api = await ControlApi.start(path, FakeNode())
    try:
        with pytest.raises(LocalError, match="another daemon answers"):
            await ControlApi.start(path, FakeNode())
        assert await get(path, "/v1/version") == 200
    finally:
        await api.close()


async def test_other_files_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="not a socket"):
        await ControlApi.start(path, FakeNode())
    assert path.read_text() == "precious"


async def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't listen"):
        await ControlApi.start(tmp_path / "no" / "s", FakeNode())


async def test_a_successors_socket_survives_our_end(tmp_path: Path) -> None:
    path = tmp_path / "s"
    api = await ControlApi.start(path, FakeNode())
    path.unlink()
    path.write_text("the next daemon's")
    await api.close()
    assert path.exists()
