"""D11: exceptions that are not ours: one line, a remedy, a documented exit code, never a trace."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from tests.cases.support import LOOPBACK, xpeer

DOCUMENTED = {0, 1, 2, 3, 4, 5, 6, 7, 8}


def founded(path: Path) -> Path:
    """A swarm without a model, in a moment."""
    from xpeer import founding
    from xpeer.config import Home
    from xpeer.founding_model import PRESETS
    from xpeer.identity import blake2b
    from xpeer.manifest import End, Manifest, PublicText
    from xpeer.manifest.model import Model

    model = Model(config=PRESETS["tiny"], num_params=1, initial_digest="")
    text = PublicText(digest=blake2b(b"text").hex(), text="text")
    manifest = Manifest(name="s", created_unix_s=0, model=model, public_text=text, end=End(steps=1))
    settings = f'[network]\nlisten = ["{LOOPBACK}"]\n[data]\nshard = ["{__file__}"]\n'
    founding.found(Home(path), manifest, lambda folder: folder.mkdir(), settings)
    return path


def test_a_negative_number_of_parameters(tmp_path: Path) -> None:
    done = xpeer("privacy", "plan", "--records", "1000", "--steps", "100", "--parameters", "-1")
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode in (2, 8)
    assert "--parameters" in done.stderr


def test_an_announced_port_of_zero(tmp_path: Path) -> None:
    home = founded(tmp_path / "h")
    done = xpeer("start", "--home", home, "--announce", "/ip4/127.0.0.1/tcp/0")
    assert "Traceback" not in done.stderr, done.stderr[-300:]
    assert (done.returncode, "network.announce" in done.stderr) == (8, True), done.stderr


def test_a_manifest_with_a_byte_that_is_not_utf8(tmp_path: Path) -> None:
    home = founded(tmp_path / "h")
    spoil(home / "manifest.json", lambda data: data[:99] + b"\xff" + data[100:])
    done = xpeer("start", "--home", home, "--dry-run")
    assert "Traceback" not in done.stderr, done.stderr[-300:]
    assert (done.returncode, "manifest" in done.stderr) == (8, True), done.stderr


def spoil(path: Path, how: Callable[[bytes], bytes]) -> None:
    mode = path.stat().st_mode
    path.chmod(0o600)
    path.write_bytes(how(path.read_bytes()))
    path.chmod(mode)


# Whatever passes the boundary


def sound(done: Result, *, faults: bool = False) -> None:
    """A documented end in one line."""
    assert done.exit_code in DOCUMENTED, (done.exit_code, done.exception)
    assert "Traceback" not in done.output
    assert faults or "a fault of xpeer" not in done.stderr, done.stderr
    if done.exit_code:
        errors = [x for x in done.stderr.splitlines() if x.startswith("xpeer: error: ")]
        assert len(errors) == 1, done.stderr
        assert " - " in errors[0]


def run(*arguments: str | Path) -> Result:
    from xpeer.cli import main

    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), KeyError("k"), MemoryError(),
                                   RuntimeError("a\n\x1b[2Jb"), OSError(28, "No space left"),
                                   UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad")])  # fmt: skip
@pytest.mark.parametrize("command", ["status", "logs", "id", "start"])
def test_any_exception_is_one_line_and_a_trace_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, error: Exception
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    modules = {"status": "node.client_of", "logs": "logs._Tail", "id": "identity.ensure_identity",
               "start": "start.load_config"}  # fmt: skip
    monkeypatch.setattr(f"xpeer.cli.{modules[command]}", fail)
    home = tmp_path / "h"
    home.mkdir(mode=0o700)
    done = run(command, "--home", home)
    sound(done, faults=True)
    assert done.exit_code == 1
    assert f"the end of {home}/daemon.log" in done.stderr
    assert ("please report it" in done.stderr) != isinstance(error, MemoryError)
    log = (home / "daemon.log").read_text()
    assert "Traceback" in log
    assert "\x1b" not in log
    from xpeer.cli.logs import parse

    (entry,) = parse(log.split("\n"))
    assert (entry.level, entry.logger) == ("error", "xpeer.cli")


def test_the_daemon_s_own_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from xpeer_daemon import service

    async def fail(*_: object) -> int:
        raise ZeroDivisionError("deep inside")

    monkeypatch.setattr(service, "run", fail)
    home = founded(tmp_path / "h")
    done = run("start", "--home", home)
    assert done.exit_code == 1
    assert "a fault of xpeer: ZeroDivisionError: deep inside" in done.stderr
    assert (home / "daemon.log").read_text().count("Traceback") == 1


# Numbers: every option that takes one, found by looking


NUMBERS = ("-1", "0", "nan", "inf", "-inf", "1e308", "1e-320", str(2**63), str(-(2**63) - 1),
           "1" + "0" * 30)  # fmt: skip
NEEDED = {
    ("plan",): ["--params", "1e6", "--link-mbit", "100", "--step-seconds", "1"],
    ("privacy", "plan"): ["--records", "1000", "--steps", "100", "--batch", "32"],
    ("init",): ["--swarm", "s", "--model-config", "none.json", "--lora-rank", "4"],
    ("generate",): ["--prompt", "x", "--model", "empty"],
    ("checkpoint", "export"): ["--hf", "out"],
}


def numeric() -> Iterator[tuple[tuple[str, ...], click.Command, click.Parameter]]:
    from tests.cases.test_d01_empty_path import commands
    from xpeer.cli import main

    for name, command in commands(main):
        for option in command.params:
            if isinstance(option.type, click.types.IntParamType | click.types.FloatParamType):
                yield name, command, option


def test_numbers_of_every_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "h"
    home.mkdir(mode=0o700)
    (home / "daemon.log").write_text("")
    Path("empty").mkdir()  # what is missing would be refused before the number is read
    Path("none.json").write_text("[]")
    tried = 0
    for name, command, option in numeric():
        for value in NUMBERS:
            if name == ("demo",) and value == "0":
                continue  # a seed; it would run
            takes_home = any(p.name == "home" for p in command.params)
            where = ["--home", str(home)] if takes_home else []
            done = run(*name, *NEEDED.get(name, []), option.opts[0], value, *where)
            sound(done)
            tried += 1
    assert tried > 150


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "1e308", str(2**70), "0.5", '"x"'])
def test_numbers_of_every_setting(tmp_path: Path, value: str) -> None:
    from xpeer import config, config_sources
    from xpeer.errors import ConfigError

    for section, key, default in config.settings():
        if isinstance(default, bool | str | list):
            continue
        (tmp_path / "config.toml").write_text(f"[{section}]\n{key} = {value}\n")
        variable = {f"XPEER_{section}_{key}".upper(): value}
        for name, environ in ((tmp_path / "config.toml", {}), (tmp_path / "no", variable)):
            try:
                made = config_sources.load(name, environ)
            except ConfigError as e:
                assert f"{section}.{key}" in str(e), e
            else:
                number = getattr(getattr(made, section), key)
                assert -1 < number <= 1e9, (section, key, number)


# Every file of a home


def flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _data: b"",
    "half": lambda data: data[: len(data) // 2],
    "flipped": flipped,
    "not-utf8": lambda data: data[:20] + b"\xff\xfe" + data[22:],
    "nul": lambda data: data[:10] + b"\0" + data[11:],
    "nested": lambda _data: b"[" * 50_000,
    "huge": lambda data: data + b" " * 3_000_000,
    "escape": lambda _data: b"\x1b]0;owned\x07",
}
FILES = ("identity.key", "credential", "manifest.json", "seeds.json", "config.toml",
         "invites.jsonl", "ledger.sqlite", "state.sqlite", "swarm.key", "admin.key",
         "checkpoints/ckpt-000000003.safetensors", "daemon.log", "lock", "xpeer.sock",
         "register/register.sqlite", "register/register.key")  # fmt: skip
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("id",), ("status",), ("start", "--dry-run"), ("start", "--paused"), ("logs",),
    ("invite", "create", "--no-seed"), ("invite", "list"), ("checkpoint", "list"),
    ("checkpoint", "verify"), ("checkpoint", "export", "--hf", "out"), ("privacy", "status"),
    ("privacy", "verify"), ("privacy", "documents"),
    ("bootstrap", "--swarm", "0" * 64), ("init", "--swarm", "t", "--preset", "tiny"),
    ("generate", "--prompt", "x"),
)  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with one of each file."""
    import torch

    from tests.unit.accounts.ledgers import open_declared
    from xpeer import founding
    from xpeer.accounts.accountant import Segment
    from xpeer.config import Home
    from xpeer.training.tensor_file import write_tensors
    from xpeer_daemon.store import Store

    home = founded(tmp_path_factory.mktemp("d11") / "h")
    of = Home(home)
    founding.record_invite(of, founding.Issued(1, "s", "", "member", 0, 0, []))
    (home / "seeds.json").write_text("[]")
    Store.open(of.state_db).close()
    with open_declared(of.ledger_db) as ledger:
        ledger.charge(Segment(1.0, 0.1, 5))
    write_tensors(home / "checkpoints" / "ckpt-000000003.safetensors", {"a": torch.zeros(3)}, {})
    (home / "daemon.log").write_text("2026-11-29T07:00:00.000Z info xpeer: hello\n")
    (home / "daemon.log.1").write_text("2026-11-29T06:00:00.000Z info xpeer: before\n")
    (home / "lock").write_text("1\n")
    (home / "xpeer.sock").write_text("no socket")
    return home


@pytest.fixture
def no_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that finds nothing wrong ends where its service would begin."""
    import xpeer_bootstrap.node as bootstrap
    from xpeer_daemon import service

    async def serve(*_: Any) -> int:
        return 0

    monkeypatch.setattr(service, "run", serve)
    monkeypatch.setattr(bootstrap, "_serve", serve)


@pytest.mark.usefixtures("no_daemon")
@pytest.mark.parametrize("name", FILES)
def test_every_file_of_a_home(
    whole: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XPEER_PRIVACY_REGISTER", str(tmp_path / "h" / "register"))
    for kind, damage in {**DAMAGES, "folder": None, "unreadable": None}.items():
        if kind == "unreadable" and os.geteuid() == 0:
            continue
        shutil.rmtree(tmp_path / "h", ignore_errors=True)
        shutil.copytree(whole, tmp_path / "h")
        path = tmp_path / "h" / name
        if damage is not None:
            spoil(path, damage)
        elif kind == "folder":
            path.unlink()
            path.mkdir()
        else:
            path.chmod(0)
        for command in COMMANDS:
            sound(run(*command, "--home", tmp_path / "h"))
