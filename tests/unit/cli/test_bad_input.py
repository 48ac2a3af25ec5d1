"""Wrong input: one line with a remedy, the documented exit code, nothing changed on the disk."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from xpeer import founding
from xpeer.cli import main
from xpeer.config import Home
from xpeer.errors import ExitCode
from xpeer.founding_model import PRESETS
from xpeer.identity import Identity, PeerId, blake2b
from xpeer.manifest import End, Manifest, PublicText
from xpeer.manifest.model import Model
from xpeer.manifest.signed import SignedManifest
from xpeer.network.membership.invites import create_token
from xpeer_daemon.lock import HomeLock

CONFIG = '[network]\nlisten = ["/ip4/127.0.0.1/tcp/0"]\n'
SEED = f"/ip4/127.0.0.1/tcp/4001/p2p/{Identity.generate().peer_id}"


def manifest(name: str) -> Manifest:
    return Manifest(
        name=name,
        created_unix_s=0,
        model=Model(config=PRESETS["tiny"], num_params=1, initial_digest=""),
        public_text=PublicText(digest=blake2b(b"text").hex(), text="text"),
        end=End(steps=1),
    )


def founded(path: Path, name: str = "demo") -> Home:
    home = Home(path)
    founding.found(home, manifest(name), lambda folder: folder.mkdir(), CONFIG)
    return home


TEXT = ("--shard", __file__)
"""Any text will do where the shard is not what is wrong."""


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return founded(tmp_path / "home")


def token(home: Home, for_peer: PeerId | None, *, age_s: float = 0.0) -> str:
    signed = SignedManifest.load(home.manifest)
    made = create_token(
        Identity.load(home.admin_key), signed.genesis, name="demo", seeds=[SEED],
        for_peer=for_peer, role="member", ttl_s=3600, now_unix_s=time.time() - age_s,
    )  # fmt: skip
    return str(made)


def picture(folder: Path) -> dict[str, str]:
    """Every entry below a folder: kind, mode and content."""
    seen = {}
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        seen[str(path.relative_to(folder))] = (
            f"{path.lstat().st_mode:o} {hashlib.sha256(content).hexdigest()}"
        )
    return seen


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    before = picture(folder)
    yield
    assert picture(folder) == before


def xpeer(home: Home, *args: str, stdin: str = "", **env: str) -> Result:
    runner = CliRunner(env=env)
    return runner.invoke(main, [args[0], "--home", str(home.path), *args[1:]], input=stdin)


def refused(result: Result, code: ExitCode, *words: str) -> None:
    """One line on stderr that names what is wrong and what to do, and nothing on stdout."""
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("xpeer: error: ")
    assert " - " in result.stderr
    for word in words:
        assert word in result.stderr
    assert result.exit_code == code


@pytest.mark.parametrize("command", ["start", "status"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[network\n", ("not valid TOML", "line 1")),
        ("[network]\nlissten = []\n", ("network.lissten", "did you mean listen?")),
        ("[netwrok]\n", ("netwrok", "did you mean network?")),
        ("listen = 1\n", ("listen",)),
        ("network = 1\n", ("[network]",)),
        ('[training]\nthrottle = "fast"\n', ("training.throttle", "'fast'")),
        ("[training]\nthrottle = 2.0\n", ("training.throttle", "<= 1", "2.0")),
        ('[data]\nshard = ["a"]\ncorpus = ["b"]\n', ("data.shard", "data.corpus")),
        (f'[daemon]\nsocket = "/{"x" * 200}"\n', ("daemon.socket", "100 bytes")),
    ],
)
def test_wrong_config(home: Home, command: str, text: str, words: tuple[str, ...]) -> None:
    home.config.write_text(text)
    with unchanged(home.path):
        refused(xpeer(home, command), ExitCode.BAD_CONFIG, *words)


def test_config_in_another_encoding(home: Home) -> None:
    home.config.write_bytes(b"# \xff\xfe")
    with unchanged(home.path):
        refused(xpeer(home, "start"), ExitCode.BAD_CONFIG, "config.toml")


def test_missing_config_that_was_named(home: Home) -> None:
    with unchanged(home.path):
        result = xpeer(home, "start", "--config", str(home.path / "no.toml"))
    refused(result, ExitCode.BAD_CONFIG, "--config", "no.toml: there is no such file")


def test_unknown_variable(home: Home) -> None:
    with unchanged(home.path):
        result = xpeer(home, "start", XPEER_NETWORK_LISEN="x")
    refused(result, ExitCode.BAD_CONFIG, "XPEER_NETWORK_LISEN", "XPEER_NETWORK_LISTEN?")


@pytest.mark.parametrize("donor", ["alice", "", "12D3KooWalice"])
def test_a_donor_is_accepted_by_its_peer_id_alone(home: Home, donor: str) -> None:
    """Members choose their names themselves."""
    with unchanged(home.path):
        result = xpeer(home, "start", "--accept-donor", donor)
    refused(result, ExitCode.BAD_CONFIG, "--accept-donor", "PeerID", "xpeer status")


def test_wrong_variable_and_flag(home: Home) -> None:
    with unchanged(home.path):
        result = xpeer(home, "start", XPEER_TRAINING_THREADS="many")
        refused(result, ExitCode.BAD_CONFIG, "training.threads", "'many'")
        result = xpeer(home, "start", "--min-peers", "-1")
        refused(result, ExitCode.BAD_CONFIG, "training.min_peers", "-1")


def test_home_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    with unchanged(tmp_path):
        refused(xpeer(Home(tmp_path / "f"), "start"), ExitCode.BAD_CONFIG, "not a folder")


def widen(path: Path) -> None:
    path.chmod(0o640)


def damage(path: Path) -> None:
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1])
    path.chmod(0o400)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize("key", ["identity_key", "swarm_key"])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (widen, ("0640", "chmod 0400")),
        (damage, ("bytes",)),
        (Path.unlink, ("does not exist",)),
        (replace_by_folder, ("can't be read",)),
    ],
)
def test_spoilt_key(
    home: Home, key: str, spoil: Callable[[Path], None], words: tuple[str, ...], dry: bool
) -> None:
    path: Path = getattr(home, key)
    spoil(path)
    with unchanged(home.path):
        result = xpeer(home, "start", *(["--dry-run"] if dry else []))
    refused(result, ExitCode.BAD_CONFIG, str(path), *words)


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read every file")
def test_key_of_somebody_else(home: Home) -> None:
    home.identity_key.chmod(0)
    with unchanged(home.path):
        refused(xpeer(home, "start"), ExitCode.BAD_CONFIG, "can't be read", "0400")


def test_no_swarm_yet(tmp_path: Path) -> None:
    home = Home(tmp_path / "empty")
    refused(xpeer(home, "start"), ExitCode.NOT_AUTHORISED, "belongs to no swarm", "xpeer init")
    assert not home.path.exists()


@pytest.mark.parametrize("dry", [True, False])
def test_privacy_that_the_manifest_does_not_allow(home: Home, dry: bool) -> None:
    with unchanged(home.path):
        result = xpeer(home, "start", "--privacy", "off", *(["--dry-run"] if dry else []), *TEXT)
    refused(result, ExitCode.BAD_CONFIG, "data.privacy = off", "privacy.mode = record")


def test_altered_manifest(home: Home) -> None:
    home.manifest.write_bytes(home.manifest.read_bytes().replace(b"llama", b"lhama"))
    with unchanged(home.path):
        refused(xpeer(home, "start"), ExitCode.NOT_AUTHORISED, "altered")


@pytest.mark.parametrize("how", ["argument", "file", "stdin"])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense", ("not a token",)),
        ("xpeer1.%%%", ("damaged",)),
        ("", ("empty",)),
    ],
)
def test_bad_token(tmp_path: Path, how: str, text: str, words: tuple[str, ...]) -> None:
    home = Home(tmp_path / "joiner")
    (tmp_path / "token").write_text(text)
    source = {"argument": text, "file": f"file:{tmp_path / 'token'}", "stdin": "-"}[how]
    with unchanged(tmp_path):
        for command in ("start", "init"):
            result = xpeer(home, command, "--join", source, stdin=text)
            refused(result, ExitCode.NOT_AUTHORISED, *words)


def test_token_file_that_is_not_there(tmp_path: Path) -> None:
    with unchanged(tmp_path):
        result = xpeer(Home(tmp_path / "joiner"), "start", "--join", f"file:{tmp_path}/no")
    refused(result, ExitCode.BAD_CONFIG, "--join", "/no can't be read")


@pytest.mark.parametrize("command", ["start", "init"])
def test_tokens_that_give_no_right(home: Home, tmp_path: Path, command: str) -> None:
    joiner = Home(tmp_path / "joiner")
    me = founding.ensure_identity(joiner).peer_id
    somebody = Identity.generate().peer_id
    good = token(home, me)
    altered = good[:60] + ("A" if good[60] != "A" else "B") + good[61:]
    with unchanged(joiner.path):
        for text, word in (
            (token(home, me, age_s=7200), "expired"),
            (token(home, None, age_s=7200), "expired"),
            (token(home, somebody), somebody),
            (altered, ""),
        ):
            refused(xpeer(joiner, command, "--join", text), ExitCode.NOT_AUTHORISED, word)


def test_token_for_a_peer_needs_its_key(home: Home, tmp_path: Path) -> None:
    joiner = Home(tmp_path / "joiner")
    result = xpeer(joiner, "start", "--join", token(home, Identity.generate().peer_id))
    refused(result, ExitCode.NOT_AUTHORISED, "xpeer id")
    assert not joiner.path.exists()


@pytest.mark.parametrize("dry", [True, False])
def test_token_of_a_foreign_swarm(home: Home, tmp_path: Path, dry: bool) -> None:
    other = founded(tmp_path / "other", "other")
    me = Identity.load(home.identity_key).peer_id
    with unchanged(home.path):
        result = xpeer(home, "start", "--join", token(other, me), *(["--dry-run"] if dry else []))
    refused(result, ExitCode.BAD_CONFIG, "belongs to swarm", "--home")


def test_a_good_token_is_not_used_up_by_a_dry_run(home: Home, tmp_path: Path) -> None:
    joiner = Home(tmp_path / "joiner")
    me = founding.ensure_identity(joiner).peer_id
    with unchanged(joiner.path):
        result = xpeer(
            joiner, "start", "--join", token(home, me), "--dry-run",
            "--listen", "/ip4/127.0.0.1/tcp/0", *TEXT,
        )  # fmt: skip
    assert result.exit_code == ExitCode.OK, result.stderr
    assert result.stdout == ""


def test_dry_run_of_a_good_home(home: Home) -> None:
    with unchanged(home.path):
        result = xpeer(
            home, "start", "--bootstrap", "--bootstrap", SEED, "--dry-run", "--skip-trial", *TEXT
        )
    assert result.exit_code == ExitCode.OK, result.stderr


def test_shard_without_text(home: Home, tmp_path: Path) -> None:
    shard = tmp_path / "shard"
    shard.mkdir()
    (shard / "empty.txt").write_text(" \n")
    (shard / "rows.jsonl").write_text('{"body": "a"}\n{"body": "b"}\n')
    (shard / "bad.jsonl").write_text('{"text": "a"}\n{"text": "b\n')
    with unchanged(tmp_path):
        for name, word in (
            ("empty.txt", "empty.txt"),
            ("*.md", "*.md"),
            ("rows.jsonl", "no row has field 'text' (fields: body)"),
            ("bad.jsonl", "bad.jsonl:2"),
        ):
            result = xpeer(home, "start", "--shard", str(shard / name), "--dry-run")
            *notes, error = result.stderr.splitlines()
            assert all(note.startswith("room: ") for note in notes)  # it is compared first
            assert error.startswith("xpeer: error: ")
            assert " - " in error
            assert word in error
            assert (result.stdout, result.exit_code) == ("", ExitCode.BAD_CONFIG)


def test_dry_run_counts_the_text(home: Home, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello, world")
    shard = ("--shard", str(tmp_path / "a.txt"))
    with unchanged(tmp_path):
        result = xpeer(home, "start", *shard, "--dry-run", "--skip-trial")
    assert result.exit_code == ExitCode.OK, result.stderr
    assert "1 documents to train on, 1 records of at most 128 tokens, 14 tokens" in result.stderr
    assert "epsilon" in result.stderr


def test_dry_run_tells_what_it_left_out(home: Home, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    for n in range(10):
        (tmp_path / "s" / f"{n}.txt.xz").write_bytes(b"")
    for name, text in (
        *(("a.json", "{}"), ("b.json", "{}"), ("a.txt", "hello, world"), ("b.txt", "")),
        ("c.jsonl", '{"text": null}\n{"text": "hello, world"}\n{"body": ""}\n'),
    ):
        (tmp_path / "s" / name).write_text(text)
    result = xpeer(home, "start", "--shard", str(tmp_path / "s"), "--dry-run", "--skip-trial")
    assert result.exit_code == ExitCode.OK
    for line in (
        "data.shard: 1 documents, 12 characters, in 3 files",
        "data.shard: 12 files left out: .xz 10, .json 2",
        "data.shard: 3 rows without text: empty 1, no field 1, null 1",
        "data.shard: 1 texts that came before",
    ):
        assert line in result.stderr.splitlines()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--listen", "/ip4/127.0.0.1/udp/1/quic"), ("network.listen", "TCP")),
        (("--listen", "127.0.0.1:4001"), ("network.listen",)),
        (("--bootstrap", "seed.example:4001"), ("network.bootstrap",)),
        (("--bootstrap", "/ip4/127.0.0.1/tcp/4001"), ("network.bootstrap", "/p2p/")),
    ],
)
def test_bad_address(home: Home, args: tuple[str, ...], words: tuple[str, ...]) -> None:
    with unchanged(home.path):
        refused(xpeer(home, "start", *args), ExitCode.BAD_CONFIG, *words)


@pytest.mark.parametrize("dry", [True, False])
def test_port_taken(home: Home, dry: bool) -> None:
    with socket.socket() as taken, unchanged(home.path):
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"/ip4/127.0.0.1/tcp/{taken.getsockname()[1]}"
        result = xpeer(home, "start", "--listen", address, *(["--dry-run"] if dry else []))
    refused(result, ExitCode.BAD_CONFIG, address)


def test_second_daemon_on_a_home(home: Home) -> None:
    with HomeLock.acquire(home), unchanged(home.path):
        result = xpeer(home, "start", *TEXT)
        refused(result, ExitCode.ERROR, f"pid {os.getpid()}", "--home")
