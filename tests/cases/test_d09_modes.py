"""D09: modes left to mkdir and umask; a home that others can enter, or write to."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.cases.support import LOOPBACK, Nodes, found, xpeer

DOCUMENTED = {"xpeer.sock": 0o660}
"""What others than the owner may open: the control socket's group."""


def open_to_others(folder: Path) -> dict[str, str]:
    """What is below a folder, it included, that group or others have a right on."""
    return {
        str(path.relative_to(folder.parent)): f"{mode:04o}"
        for path in (folder, *folder.rglob("*"))
        if not path.is_symlink()
        and (mode := stat.S_IMODE(path.lstat().st_mode)) & 0o077
        and DOCUMENTED.get(path.name) != mode
    }


@pytest.fixture
def lax() -> Iterator[None]:
    """The usual umask, and what a careless one allows, for processes that the test starts."""
    previous = os.umask(0)
    yield
    os.umask(previous)


@pytest.mark.usefixtures("lax")
def test_a_home_that_others_may_enter_is_closed(tmp_path: Path, shard: Path, nodes: Nodes) -> None:
    """Founded, run, exported."""
    home = nodes.home("a")
    home.mkdir()
    home.chmod(0o755)
    found(home, shard, fields=["end.steps=6"])
    assert open_to_others(home) == {}
    nodes.start("a", XPEER_DAEMON_EXIT_WHEN_FINISHED="true", XPEER_CHECKPOINT_EVERY_S="1")
    nodes.until("a", lambda status: status.progress.step > 0)
    assert open_to_others(home) == {}
    nodes.stop("a")
    done = xpeer("checkpoint", "export", "--home", home, "--hf", tmp_path / "export")
    assert done.returncode == 0, done.stderr
    assert open_to_others(home) == {}
    assert {p.name for p in home.iterdir()} >= {"daemon.log", "state.sqlite", "ledger.sqlite"}
    assert open_to_others(tmp_path / "export") == {}
    assert open_to_others(Path(os.environ["XPEER_PRIVACY_REGISTER"])) == {}


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


def test_root_follows_no_planted_link(tmp_path: Path) -> None:
    home, victim = founded(tmp_path / "h"), tmp_path / "victim"
    victim.write_text("precious\n")
    home.chmod(0o777)
    (home / "daemon.log").symlink_to(victim)
    (home / "state.sqlite").mkdir()  # ends a start that came that far
    done = xpeer("start", "--home", home)
    assert victim.read_text() == "precious\n"
    assert (done.returncode, "others can write to it" in done.stderr) == (8, True), done.stderr
    home.chmod(0o700)
    done = xpeer("start", "--home", home)
    assert (done.returncode, "daemon.log is a link" in done.stderr) == (8, True), done.stderr
    assert victim.read_text() == "precious\n"


# The rest of the kind, in this process


def run(*arguments: str | Path) -> Result:
    from xpeer.cli import main

    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.fixture
def home(tmp_path: Path) -> Path:
    assert run("id", "--home", tmp_path / "h").exit_code == 0
    return tmp_path / "h"


COMMANDS = [("id",), ("init", "--swarm", "s", "--preset", "tiny"), ("start",),
            ("bootstrap", "--swarm", "0" * 64), ("invite", "create", "--no-seed"),
            ("start", "--dry-run")]  # fmt: skip


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o720, 0o775])
def test_nothing_is_written_where_others_may_write(home: Path, mode: int) -> None:
    home.chmod(mode)
    before = sorted(home.iterdir())
    for command in COMMANDS:
        done = run(*command, "--home", home)
        assert (done.exit_code, "others can write to it" in done.stderr) == (8, True), done.stderr
    assert (sorted(home.iterdir()), stat.S_IMODE(home.stat().st_mode)) == (before, mode)


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o711, 0o705])
def test_an_older_home_is_closed_and_says_so(home: Path, mode: int) -> None:
    home.chmod(mode)
    (home / "state.sqlite").write_bytes(b"")
    (home / "state.sqlite").chmod(0o644)
    done = run("id", "--home", home)
    assert done.exit_code == 0
    assert f"had mode {mode:04o}" in done.stderr
    assert "state.sqlite" in done.stderr
    assert open_to_others(home) == {}
    assert run("id", "--home", home).stderr == ""


def test_a_key_that_others_could_read_stays_an_error(home: Path) -> None:
    (home / "identity.key").chmod(0o444)
    done = run("id", "--home", home)
    assert (done.exit_code, "others can use it" in done.stderr) == (8, True)


def test_a_folder_with_other_things_is_not_closed_unasked(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    work.chmod(0o755)
    (work / "thesis.tex").write_text("x")
    done = run("id", "--home", work)
    assert (done.exit_code, "holds other things" in done.stderr) == (8, True)
    assert stat.S_IMODE(work.stat().st_mode) == 0o755
    (work / "thesis.tex").rename(work / "config.toml")
    assert run("id", "--home", work).exit_code == 0


def test_a_folder_that_anybody_may_replace(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    inner = tmp_path / "open" / "a" / "h"
    done = run("id", "--home", inner)
    assert (done.exit_code, "in its place" in done.stderr) == (8, True)
    (tmp_path / "open").chmod(0o1777)  # sticky, as /tmp is
    assert run("id", "--home", inner).exit_code == 0
    (tmp_path / "link").symlink_to(inner)
    assert run("id", "--home", tmp_path / "link").exit_code == 0
    (tmp_path / "open").chmod(0o777)
    assert run("id", "--home", tmp_path / "link").exit_code == 8


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_belongs_to_somebody_else(home: Path, tmp_path: Path) -> None:
    os.chown(home, 12345, 12345)
    done = run("id", "--home", home)
    assert (done.exit_code, "belongs to user 12345" in done.stderr) == (8, True)
    os.chown(home, 0, 0)
    (tmp_path / "link").symlink_to(home)
    os.chown(tmp_path / "link", 12345, 12345, follow_symlinks=False)
    done = run("id", "--home", tmp_path / "link")
    assert (done.exit_code, "is a link that user 12345" in done.stderr) == (8, True)


def plant_link(path: Path) -> None:
    path.symlink_to(path.parent.parent / "victim")


def plant_pipe(path: Path) -> None:
    os.mkfifo(path)


def plant_folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("plant", [plant_link, plant_pipe, plant_folder])
@pytest.mark.parametrize("name", ["daemon.log", "lock", "invites.jsonl", "state.sqlite",
                                  "ledger.sqlite"])  # fmt: skip
def test_what_is_opened_to_write_is_a_file_of_ours(
    home: Path, name: str, plant: Callable[[Path], None]
) -> None:
    from xpeer import founding
    from xpeer.accounts.ledger import Ledger
    from xpeer.config import Home
    from xpeer.errors import LocalError
    from xpeer_daemon import logs
    from xpeer_daemon.lock import HomeLock
    from xpeer_daemon.store import Store

    victim, of = home.parent / "victim", Home(home)
    victim.write_bytes(b"")
    plant(home / name)
    issued = founding.Issued(1, "s", "", "member", 0, 0, [])
    openers: dict[str, Callable[[], object]] = {
        "daemon.log": lambda: logs.setup(of, "info", "text"),
        "lock": lambda: HomeLock.acquire(of),
        "invites.jsonl": lambda: founding.record_invite(of, issued),
        "state.sqlite": lambda: Store.open(of.state_db),
        "ledger.sqlite": lambda: Ledger.open(of.ledger_db),
    }
    with pytest.raises(LocalError, match=name):
        openers[name]()
    assert victim.read_bytes() == b""


def test_logs_that_were_rotated_are_closed_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import logging

    from xpeer.config import Home
    from xpeer_daemon import logs

    monkeypatch.setattr(logs, "MAX_FILE_BYTES", 200)
    level, previous = logging.getLogger().level, os.umask(0)
    try:
        (home / "daemon.log").write_text("older\n")
        (home / "daemon.log").chmod(0o644)
        logs.setup(Home(home), "info", "text")
        for n in range(9):
            logging.getLogger("xpeer.test").warning("line %d %s", n, "x" * 50)
        assert (home / "daemon.log.1").exists()
        assert open_to_others(home) == {}
    finally:
        os.umask(previous)
        logs.close()
        logging.getLogger().setLevel(level)
        logging.getLogger("xpeer").setLevel(logging.NOTSET)
        logging.captureWarnings(False)


def test_a_register_that_others_may_enter_or_write_to(tmp_path: Path) -> None:
    from xpeer.accounts.register import Register
    from xpeer.errors import ConfigError

    folder = tmp_path / "register"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match="others can write to it"):
        Register.open(folder)
    folder.chmod(0o755)
    Register.open(folder).close()
    assert open_to_others(folder) == {}
