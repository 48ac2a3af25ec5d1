"""What a node says that is no field of a structure, against what the code does."""

from __future__ import annotations

import ast
import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from tests import leaving
from xpeer import surfaces
from xpeer.cli import COMMANDS, asking_the_daemon
from xpeer.config import Home
from xpeer.control import ROUTES
from xpeer.founding_model import initial_model
from xpeer.wire import frames
from xpeer_daemon import logs
from xpeer_daemon.api import _application
from xpeer_daemon.store import EventRow, KnownPeer, RoundRow, Store

ROOT = Path(__file__).parents[2]


def test_protocols_and_frames() -> None:
    served = {
        str(module.PROTOCOL)
        for module in leaving.modules()
        if module.__name__.startswith(("xpeer.network", "xpeer.roster"))
        and hasattr(module, "PROTOCOL")
    }
    assert served == set(surfaces.PROTOCOLS)
    assert tuple(kind.name for kind in frames.Kind) == surfaces.FRAMES


def test_routes_of_the_control_api() -> None:
    subject: Any = None
    routes = {
        f"{route.method} {route.resource.canonical}"
        for route in _application(subject).router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    assert routes == {f"{route.method} /v1/{name}" for name, route in ROUTES.items()}


def test_commands() -> None:
    assert set(surfaces.COMMANDS) == set(COMMANDS)
    assert not set(COMMANDS) & set(asking_the_daemon())


def test_columns_of_the_history(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "state.sqlite")
    store.add_round(RoundRow(slot=1))
    store.close()
    database = sqlite3.connect(tmp_path / "state.sqlite")
    tables = {"rounds": RoundRow, "events": EventRow, "peers": KnownPeer}
    names = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
    names = {name for name in names if not name.startswith("sqlite_")}
    assert names == {*tables, "known"}  # its value is store.Known, as JSON
    for table, row in tables.items():
        columns = {column[1] for column in database.execute(f"PRAGMA table_info({table})")}
        assert columns - {"id"} == set(leaving.fields(row))
    database.close()


def test_an_export_holds_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    initial_model(None, None, "tiny").write(folder)
    assert tuple(sorted(path.name for path in folder.iterdir())) == surfaces.EXPORTED
    header = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    assert msgspec.json.decode(header[8 : 8 + length])["__metadata__"] == {"format": "pt"}


def calls(path: Path, owners: tuple[str, ...], names: tuple[str, ...]) -> Iterator[str]:
    """The first argument, but for a level, of every call of one of these methods, in order."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [
        (node.lineno, node.args[node.func.attr == "log"])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in names
        and ast.unparse(node.func.value).split(".")[-1] in owners
    ]
    for _, argument in sorted(found, key=lambda each: each[0]):
        yield str(argument.value) if isinstance(argument, ast.Constant) else ast.unparse(argument)


LEVELS = ("debug", "info", "warning", "error", "exception", "critical", "log")


def test_what_the_trainer_logs() -> None:
    logged = {}
    for folder in ("accounts", "mixing", "privacy", "trainer", "training", "wire"):
        for path in sorted((ROOT / "xpeer" / folder).rglob("*.py")):
            if lines := tuple(calls(path, ("log", "logger", "logging"), LEVELS)):
                logged[".".join(path.relative_to(ROOT).with_suffix("").parts)] = lines
    assert logged == surfaces.TRAINER_LOGS


def test_events() -> None:
    kinds = {
        kind
        for path in sorted((ROOT / "daemon").rglob("*.py"))
        for kind in calls(path, ("_store", "store"), ("add_event",))
    }
    assert kinds == set(surfaces.EVENTS)


def test_the_log_goes_to_stderr_and_the_home_alone(tmp_path: Path) -> None:
    root = logging.getLogger()
    before = list(root.handlers)
    logs.setup(Home(tmp_path), "info", "text")
    try:
        added = [handler for handler in root.handlers if handler not in before]
        stream, file = added
        assert type(stream) is logging.StreamHandler
        assert isinstance(file, logging.FileHandler)
        assert Path(file.baseFilename) == tmp_path / "daemon.log"
    finally:
        logs.close()
