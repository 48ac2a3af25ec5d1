"""A home is made whole or not at all, and nothing in it is ever replaced by surprise."""

from __future__ import annotations

import os
import stat
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest
from click.testing import CliRunner
from msgspec import structs

from xpeer import founding
from xpeer.cli import main
from xpeer.config import Home
from xpeer.errors import ConfigError, LocalError, NotAuthorisedError
from xpeer.founding import Issued
from xpeer.identity import Identity, PeerId, blake2b
from xpeer.manifest import End, Manifest, PublicText
from xpeer.manifest.model import Model
from xpeer.manifest.signed import SignedManifest, swarm_key_digest
from xpeer.network.membership.invites import Token, create_token

SEED = f"/ip4/192.0.2.1/tcp/4001/p2p/{Identity.generate().peer_id}"


def manifest(text: str = "text") -> Manifest:
    return Manifest(
        name="demo",
        created_unix_s=1,
        model=Model({"model_type": "llama"}, 1, "ab"),
        public_text=PublicText(blake2b(text.encode()).hex(), text),
        end=End(steps=1),
    )


def initial(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")


def found(path: Path) -> Home:
    founding.found(Home(path), manifest(), initial, "# mine\n")
    return Home(path)


def token(home: Home, for_peer: PeerId | None = None) -> Token:
    signed = SignedManifest.load(home.manifest)
    admin = Identity.load(home.admin_key)
    return create_token(
        admin,
        signed.genesis,
        name="demo",
        seeds=[SEED],
        for_peer=for_peer,
        role="member",
        ttl_s=60,
        now_unix_s=time.time(),
    )


def picture(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every entry below a folder."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mode,
            path.read_bytes() if path.is_file() else b"",
        )
        for path in folder.rglob("*")
    }


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def full(*_args: object, **_kwargs: object) -> NoReturn:
    raise OSError(28, "No space left on device")


def test_a_founded_home(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        home = found(tmp_path / "deep" / "home")
    finally:
        os.umask(old)
    assert mode(home.path) == 0o700
    for secret in (home.identity_key, home.admin_key, home.swarm_key):
        assert mode(secret) == 0o400
    swarm_id = SignedManifest.load(home.manifest).genesis.swarm_id
    certificate = founding.load_credential(home).verify(swarm_id, time.time())
    assert certificate.role == "admin"
    assert certificate.subject == Identity.load(home.identity_key).peer_id
    assert certificate.not_after_unix_s > time.time() + 9 * 365 * 86400
    key = founding.load_swarm_key(home)
    assert len(key) == 32
    expected = structs.replace(manifest(), swarm_key_digest=swarm_key_digest(key))
    assert SignedManifest.load(home.manifest).open(swarm_id) == expected
    assert Identity.load(home.admin_key).peer_id != Identity.load(home.identity_key).peer_id
    assert [p.name for p in home.path.parent.iterdir()] == ["home"]


def test_two_swarms_never_share_a_home(tmp_path: Path) -> None:
    home = found(tmp_path / "home")
    before = picture(tmp_path)
    with pytest.raises(ConfigError, match="belongs to a swarm already"):
        found(home.path)
    assert picture(tmp_path) == before


@pytest.mark.parametrize("name", ["manifest.json", "credential", "admin.key", "swarm.key"])
def test_any_part_of_a_swarm_is_enough_to_refuse(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(ConfigError, match=name):
        found(tmp_path)
    assert picture(tmp_path).keys() == {name}


def test_what_a_person_wrote_is_kept(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.config.write_text("# yours\n")
    (tmp_path / "notes").write_text("keep")
    key = founding.ensure_identity(home)
    found(tmp_path)
    assert home.config.read_text() == "# yours\n"
    assert (tmp_path / "notes").read_text() == "keep"
    assert Identity.load(home.identity_key).peer_id == key.peer_id


@pytest.mark.parametrize("existing", [True, False])
def test_an_error_leaves_nothing_behind(tmp_path: Path, existing: bool) -> None:
    home = Home(tmp_path / "a" / "b")
    if existing:
        home.path.mkdir(parents=True)
        home.config.write_text("# mine\n")
    before = picture(tmp_path)

    def fail(_folder: Path) -> NoReturn:
        raise ConfigError("no model")

    for write in (fail, full):
        with pytest.raises(LocalError):
            founding.found(home, manifest(), write, "")
        assert picture(tmp_path) == before


@pytest.mark.parametrize("calls", [1, 3, 5])
def test_a_full_disk_while_moving_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    home = Home(tmp_path)
    founding.ensure_identity(home)
    before = picture(tmp_path)
    done: list[Path] = []
    replace = Path.replace

    def failing(self: Path, target: Path) -> Path:
        done.append(self)
        if len(done) == calls:
            full()
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(LocalError, match="No space left"):
        found(tmp_path)
    assert picture(tmp_path) == before


def test_the_credential_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    replace = Path.replace

    def noting(self: Path, target: Path) -> Path:
        moved.append(self.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", noting)
    found(tmp_path)
    assert moved[-1] == "credential"
    assert len(moved) == 7


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_service_user_needs_only_its_own_folder(tmp_path: Path) -> None:
    home = Home(tmp_path / "xpeer")
    home.path.mkdir()
    tmp_path.chmod(0o500)
    try:
        assert found(home.path).credential.exists()
    finally:
        tmp_path.chmod(0o700)


def test_staging_lies_inside_an_existing_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parents: list[Path] = []
    make = tempfile.mkdtemp

    def noting(**kwargs: Any) -> str:
        parents.append(kwargs["dir"])
        return str(make(**kwargs))

    monkeypatch.setattr(tempfile, "mkdtemp", noting)
    founding.ensure_identity(Home(tmp_path))
    assert parents == [tmp_path]


def test_a_manifest_that_nobody_could_receive(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the manifest has \d+ bytes"):
        founding.found(Home(tmp_path / "h"), manifest("\0" * 200_000), initial, "")
    assert not list(tmp_path.iterdir())


def test_a_home_that_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LocalError):
        found(tmp_path / "file" / "home")
    assert picture(tmp_path).keys() == {"file"}


def test_identity_is_made_once(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    first = founding.ensure_identity(home)
    assert founding.ensure_identity(home).peer_id == first.peer_id
    assert mode(home.path) == 0o700
    assert mode(home.identity_key) == 0o400
    assert picture(tmp_path).keys() == {"home", "home/identity.key"}


def test_joining_with_a_named_token(tmp_path: Path) -> None:
    home, other = found(tmp_path / "a"), Home(tmp_path / "b")
    peer_id = founding.ensure_identity(other).peer_id
    made = founding.prepare_join(other, str(token(home, peer_id)), "# mine\n")
    credential = founding.load_credential(other)
    assert credential.peer_id == peer_id
    credential.verify(made.swarm_id, time.time())
    assert founding.load_seeds(other) == [SEED]
    assert other.config.read_text() == "# mine\n"
    assert not other.swarm_key.exists()
    assert not other.manifest.exists()
    # A fresh token of the same swarm renews the membership; what was written is kept.
    founding.prepare_join(other, str(token(home, peer_id)), "# other\n")
    assert other.config.read_text() == "# mine\n"
    founding.keep_admission(other, SignedManifest.load(home.manifest), bytes(32))
    assert founding.load_swarm_key(other) == bytes(32)
    assert mode(other.swarm_key) == 0o400


def test_a_bearer_token_needs_no_key(tmp_path: Path) -> None:
    home, other = found(tmp_path / "a"), Home(tmp_path / "b")
    founding.prepare_join(other, str(token(home)))
    key = Identity.load(other.identity_key)
    assert founding.load_credential(other).peer_id == key.peer_id


def test_the_token_of_a_unit_file_may_expire(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, other = found(tmp_path / "a"), Home(tmp_path / "b")
    text = str(token(home))
    founding.prepare_join(other, text)
    before = picture(other.path)
    later = time.time() + 86400
    monkeypatch.setattr(time, "time", lambda: later)
    assert founding.prepare_join(other, text) == Token.parse(text)
    assert picture(other.path) == before
    said = CliRunner().invoke(
        main, ["start", "--home", str(other.path), "--join", text, "--dry-run"]
    )
    assert "data.shard is empty" in said.output  # what comes after the token
    assert "expired" not in said.output
    with pytest.raises(NotAuthorisedError, match="expired"):
        founding.prepare_join(Home(tmp_path / "c"), text)
    assert not (tmp_path / "c").exists()


def test_tokens_that_do_not_join(tmp_path: Path) -> None:
    home, other = found(tmp_path / "a"), found(tmp_path / "b")
    joiner = Home(tmp_path / "c")
    before = picture(tmp_path)
    named = str(token(home, Identity.generate().peer_id))
    with pytest.raises(NotAuthorisedError, match="has no key"):
        founding.prepare_join(joiner, named)
    with pytest.raises(NotAuthorisedError):
        founding.prepare_join(joiner, "xpeer1.nonsense")
    with pytest.raises(ConfigError, match="belongs to swarm"):
        founding.prepare_join(other, str(token(home)))
    with pytest.raises(ConfigError, match="founded this swarm"):
        founding.prepare_join(home, str(token(home)))
    assert picture(tmp_path) == before


def test_damaged_files_are_named(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with pytest.raises(NotAuthorisedError, match="belongs to no swarm"):
        founding.load_credential(home)
    home.credential.write_bytes(b"\xff")
    with pytest.raises(NotAuthorisedError, match="malformed"):
        founding.load_credential(home)
    assert founding.load_seeds(home) == []
    home.seeds.write_bytes(b"[1")
    with pytest.raises(ConfigError, match="damaged"):
        founding.load_seeds(home)
    home.swarm_key.write_bytes(bytes(31))
    home.swarm_key.chmod(0o400)
    with pytest.raises(ConfigError, match="31 bytes"):
        founding.load_swarm_key(home)
    home.swarm_key.chmod(0o440)
    with pytest.raises(ConfigError, match="mode 0440"):
        founding.load_swarm_key(home)


def test_invitations_are_remembered_without_their_secrets(tmp_path: Path) -> None:
    home = found(tmp_path)
    assert founding.load_invites(home) == []
    tokens = [token(home), token(home, Identity.generate().peer_id)]
    for made in tokens:
        founding.record_invite(home, Issued.of(made))
    listed = founding.load_invites(home)
    assert [entry.serial for entry in listed] == [made.certificate.serial for made in tokens]
    content = home.invites.read_text()
    assert tokens[0].bearer.hex() not in content
    assert str(tokens[0])[:60] not in content
    assert mode(home.invites) == 0o600
    home.invites.write_text(content + "{}\n")
    with pytest.raises(ConfigError, match=r"invites\.jsonl:3 is damaged"):
        founding.load_invites(home)
