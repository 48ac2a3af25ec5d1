"""The table of everything that leaves, against the structures that do."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import logging
import pkgutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest

import xpeer
import xpeer_bootstrap
import xpeer_daemon
from xpeer.cli import COMMANDS
from xpeer.config import Home
from xpeer.founding_model import initial_model
from xpeer.privacy import channels
from xpeer.privacy.channel import TREATMENTS
from xpeer.privacy.channels import CHANNELS, NEVER_LEAVE, THE_MANIFEST
from xpeer.training import answers, commands
from xpeer.wire import frames, messages
from xpeer_daemon import logs
from xpeer_daemon.api import _application
from xpeer_daemon.store import RoundRow, Store

PACKAGES = (xpeer, xpeer_daemon, xpeer_bootstrap)
ROOT = Path(__file__).parents[3]
DATACLASSES = ("xpeer.update.", "xpeer.training.checkpoint.Bundle")
"""Beside all msgspec structures: these cross processes or go to the disk as well."""


def modules() -> Iterator[ModuleType]:
    for package in PACKAGES:
        for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not found.name.endswith("__main__"):
                yield importlib.import_module(found.name)


def structures(module: ModuleType) -> Iterator[tuple[str, list[str]]]:
    """Names and fields of what a module defines and sends or saves."""
    for name, kind in vars(module).items():
        full = f"{module.__name__}.{name}"
        if not isinstance(kind, type) or kind.__module__ != module.__name__:
            continue
        if issubclass(kind, msgspec.Struct):
            yield full, [field.name for field in msgspec.structs.fields(kind)]
        elif dataclasses.is_dataclass(kind) and full.startswith(DATACLASSES):
            yield full, [field.name for field in dataclasses.fields(kind)]


def known_to_stay(name: str) -> bool:
    return any(name == kept or (kept.endswith(".") and name.startswith(kept))
               for kept in (*NEVER_LEAVE, THE_MANIFEST))  # fmt: skip


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    return {name: fields for module in modules() for name, fields in structures(module)}


def missing(found: dict[str, list[str]]) -> list[str]:
    """Fields that leave and are not in the table."""
    return [
        f"{name}.{field}" if field else name
        for name, fields in found.items()
        if not known_to_stay(name)
        for field in ["", *fields]
        if name not in CHANNELS or (field and field not in CHANNELS[name].fields)
    ]


def test_every_field_that_leaves_is_in_the_table(found: dict[str, list[str]]) -> None:
    assert missing(found) == []


def test_the_table_lists_nothing_that_is_gone(found: dict[str, list[str]]) -> None:
    for name, channel in CHANNELS.items():
        assert set(channel.fields) == set(found[name]), name
    for name in NEVER_LEAVE:
        assert any(other.startswith(name) for other in found), name


def test_a_new_field_or_structure_would_be_noticed(found: dict[str, list[str]]) -> None:
    terms = "xpeer.wire.messages.Terms"
    assert missing(found | {terms: [*found[terms], "loss_train"]}) == [f"{terms}.loss_train"]
    assert missing({"xpeer.wire.messages.Gossip": []}) == ["xpeer.wire.messages.Gossip"]
    added = msgspec.defstruct("Added", [("secret", int)], module=messages.__name__)
    module = ModuleType(messages.__name__)
    module.Added = added  # type: ignore[attr-defined]
    assert list(structures(module)) == [(f"{messages.__name__}.Added", ["secret"])]


def test_treatments_are_of_the_legend_and_all_have_a_use() -> None:
    used = {treatment for channel in CHANNELS.values() for treatment in channel.fields.values()}
    assert used == set(TREATMENTS)
    legend = str(channels.__doc__)
    for treatment in TREATMENTS:
        assert f"    {treatment:8}" in legend


def test_nothing_local_is_seen_by_others() -> None:
    for name, channel in channels.seen_by_others().items():
        assert "local" not in channel.fields.values(), name


def test_everything_that_a_trainer_sends_is_in_the_table() -> None:
    sent = {kind.__name__ for kind in answers.FromTrainer.__args__ + answers.Result.__args__}
    prefix = answers.__name__
    listed = {name.rpartition(".")[2] for name in CHANNELS if name.startswith(prefix)}
    assert sent == listed
    for kind in commands.ToTrainer.__args__ + commands.Command.__args__:
        assert known_to_stay(f"{kind.__module__}.{kind.__name__}")


def test_protocols_and_frames() -> None:
    served = {
        str(module.PROTOCOL)
        for module in modules()
        if module.__name__.startswith("xpeer.network") and hasattr(module, "PROTOCOL")
    }
    assert served == set(channels.PROTOCOLS)
    assert tuple(kind.name for kind in frames.Kind) == channels.FRAMES


def test_routes_of_the_control_api() -> None:
    subject: Any = type("Subject", (), {"checkpoint": None, "end": None})
    routes = {
        f"{route.method} {route.resource.canonical}"
        for route in _application(subject).router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    assert routes == set(channels.ROUTES)


def test_commands() -> None:
    assert set(channels.COMMANDS) == set(COMMANDS)


def test_columns_of_the_history(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "state.sqlite")
    store.add_round(RoundRow(slot=1))
    store.close()
    database = sqlite3.connect(tmp_path / "state.sqlite")
    tables = {"rounds": "RoundRow", "events": "EventRow", "peers": "KnownPeer"}
    names = {name for (name,) in database.execute("SELECT name FROM sqlite_master")}
    names = {name for name in names if not name.startswith("sqlite_")}
    assert names == {*tables, "known"}  # its value is store.Known, as JSON
    for table, row in tables.items():
        columns = {column[1] for column in database.execute(f"PRAGMA table_info({table})")}
        assert columns - {"id"} == set(CHANNELS[f"xpeer_daemon.store.{row}"].fields)
    database.close()


def test_an_export_holds_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    initial_model(None, None, "tiny").write(folder)
    assert tuple(sorted(path.name for path in folder.iterdir())) == channels.EXPORTED
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
    for folder in ("training", "privacy", "wire"):
        for path in sorted((ROOT / "xpeer" / folder).rglob("*.py")):
            if lines := tuple(calls(path, ("log", "logger", "logging"), LEVELS)):
                logged[".".join(path.relative_to(ROOT).with_suffix("").parts)] = lines
    assert logged == channels.TRAINER_LOGS


def test_events() -> None:
    kinds = {
        kind
        for path in sorted((ROOT / "daemon").rglob("*.py"))
        for kind in calls(path, ("_store", "store"), ("add_event",))
    }
    assert kinds == set(channels.EVENTS)


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
