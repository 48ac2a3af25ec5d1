"""Makes homes: with a key, a new swarm, or the right to join one.

Files are first written to a staging folder and moved into the home at the end, so that an error
changes nothing.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec import Struct, structs

from xpeer.config import Home
from xpeer.errors import ConfigError, LocalError, NotAuthorisedError
from xpeer.files import NOT_OURS, open_own, private_umask, room_for, stage, sync
from xpeer.identity import Identity, read_secret, write_secret
from xpeer.leaves import Public, seen_by
from xpeer.manifest import Manifest
from xpeer.manifest.signed import MAX_MANIFEST_BYTES, SignedManifest, swarm_key_digest
from xpeer.network.membership.certificates import Credential, Role
from xpeer.network.membership.invites import Token, grant

FOUNDER_S = 10 * 365 * 86400.0


def ensure_identity(home: Home) -> Identity:
    """This node's key. It is made if there is none."""
    if home.identity_key.exists():
        return Identity.load(home.identity_key)
    with _beside(home) as new:
        return _identity_for(home, new)


def make_folder(path: Path) -> None:
    """Make a folder that only its owner can enter, with its parents.

    Raises:
        ConfigError: it can't be made.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"--home: {path} can't be made: {e.strerror}", "choose another") from e


@dataclass(frozen=True)
class Founded:
    """A new swarm, as its founder sees it."""

    peer_id: str
    swarm_id: str
    manifest: Manifest


def found(
    home: Home,
    manifest: Manifest,
    write_initial: Callable[[Path], None],
    config_text: str,
    trial: Callable[[Home], None] | None = None,
) -> Founded:
    """Make a swarm and its first member.

    Args:
        home: belongs to no swarm yet.
        manifest: a new admin key signs it.
        write_initial: called with a folder; writes the initial model there.
        config_text: config.toml to write if there is none.
        trial: called with the staging folder as a home, before it becomes the home. If it raises,
            nothing is changed.

    Raises:
        ConfigError: the home belongs to a swarm already, or the manifest is too large to be sent.
        LocalError: the home can't be written.
    """
    refuse_second_swarm(home)
    with _beside(home) as new:
        identity = _identity_for(home, new)
        admin = Identity.generate()
        admin.save(new.admin_key)
        swarm_key = secrets.token_bytes(32)
        write_secret(new.swarm_key, swarm_key)
        manifest = structs.replace(manifest, swarm_key_digest=swarm_key_digest(swarm_key))
        signed = SignedManifest.sign(manifest, admin)
        new.manifest.write_bytes(_sendable(signed))
        certificate = grant(signed.genesis, identity.peer_id, "admin", FOUNDER_S, time.time())
        credential = Credential.issue(admin, certificate, identity.peer_id)
        new.credential.write_bytes(credential.to_bytes())
        write_initial(new.initial_model)
        if not home.config.exists():
            new.config.write_text(config_text, encoding="utf-8")
        if trial is not None:
            trial(new)
    return Founded(identity.peer_id, signed.genesis.swarm_id, manifest)


def prepare_join(home: Home, token_text: str, config_text: str | None = None) -> Token:
    """Check a token and store its credential. A member gives the swarm key later, at `start`.

    Args:
        home: belongs to no swarm yet, or to the token's swarm.
        token_text: as `xpeer invite create` printed it.
        config_text: config.toml to write if there is none.

    Raises:
        NotAuthorisedError: the token is damaged, has expired, or is for another PeerID.
        ConfigError: the home belongs to another swarm.
    """
    token = check_token(home, token_text)
    if _has_joined(home, token):
        return token
    with _beside(home) as new:
        identity = _identity_for(home, new)
        credential = token.credential_for(identity, time.time())
        new.credential.write_bytes(credential.to_bytes())
        new.seeds.write_bytes(msgspec.json.encode(token.seeds))
        if config_text is not None and not home.config.exists():
            new.config.write_text(config_text, encoding="utf-8")
    return token


def check_token(home: Home, text: str) -> Token:
    """Refuse a token that this home can't join with. It writes nothing.

    The token that the home has joined with may have expired: a unit file may go on naming it.

    Raises:
        NotAuthorisedError: the token is damaged, has expired, or is for another PeerID.
        ConfigError: the home belongs to another swarm, or founded this one.
    """
    token = Token.parse(text)
    refuse_other_swarm(home, token.swarm_id)
    if home.admin_key.exists():
        raise ConfigError(
            f"home {home.path} founded this swarm: it needs no token", "leave out --join"
        )
    if not _has_joined(home, token):
        _require_usable(home, token)
    return token


def _has_joined(home: Home, token: Token) -> bool:
    return home.credential.exists() and load_credential(home).body == token.body


def _require_usable(home: Home, token: Token) -> None:
    known = Identity.load(home.identity_key) if home.identity_key.exists() else None
    if known is None and not token.bearer:
        raise NotAuthorisedError(
            f"the token is for {token.certificate.subject}, and home {home.path} has no key",
            "give the admin the PeerID that `xpeer id` prints, and join with the token for it",
        )
    token.credential_for(known or Identity.generate(), time.time())


@seen_by("home")
class Issued(Struct, frozen=True, forbid_unknown_fields=True):
    """An invitation as the founder's home lists it. Nobody can join with it."""

    serial: Public[int]
    swarm_id: Public[str]
    subject: Public[str]
    role: Public[Role]
    not_before_unix_s: Public[int]
    join_before_unix_s: Public[int]
    seeds: Public[list[str]]

    @classmethod
    def of(cls, token: Token) -> Issued:
        """The parts of a token that are no secret."""
        made = token.certificate
        return cls(
            serial=made.serial,
            swarm_id=token.swarm_id,
            subject=made.subject,
            role=made.role,
            not_before_unix_s=made.not_before_unix_s,
            join_before_unix_s=made.join_before_unix_s,
            seeds=token.seeds,
        )


def record_invite(home: Home, issued: Issued) -> None:
    """Append an invitation to the home's list.

    Raises:
        LocalError: the list can't be written.
    """
    line = msgspec.json.encode(issued) + b"\n"
    try:
        # One write per line, so that the lines of two commands do not mix.
        fd = open_own(home.invites, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        with os.fdopen(fd, "ab", buffering=0) as file:
            file.write(line)
            os.fsync(fd)
    except OSError as e:
        raise LocalError(
            f"{home.invites} can't be written: {e.strerror}", "check disk and rights"
        ) from e


def load_invites(home: Home) -> list[Issued]:
    """All invitations that were made in this home, the oldest first.

    Raises:
        ConfigError: a line is damaged.
    """
    try:
        lines = home.invites.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as e:
        raise ConfigError(f"{home.invites} can't be read: {e.strerror}", "check its mode") from e
    invites = []
    for number, line in enumerate(lines, start=1):
        try:
            invites.append(msgspec.json.decode(line, type=Issued))
        except (msgspec.MsgspecError, ValueError, RecursionError) as e:
            raise ConfigError(f"{home.invites}:{number} is damaged: {e}", "remove that line") from e
    return invites


def keep_admission(home: Home, manifest: SignedManifest, swarm_key: bytes) -> None:
    """Store the manifest and the swarm key that a member handed over."""
    with _beside(home) as new:
        new.manifest.write_bytes(manifest.to_bytes())
        write_secret(new.swarm_key, swarm_key)


def forget_join(home: Home) -> None:
    """Undo `prepare_join`, but keep the identity.

    It changes nothing in a founder's home, or in one that was admitted or has trained.
    """
    more = (home.admin_key, home.swarm_key, home.manifest, home.ledger_db, home.checkpoints)
    if any(path.exists() for path in more):
        return
    for path in (home.credential, home.seeds):
        path.unlink(missing_ok=True)


def load_credential(home: Home) -> Credential:
    """This node's credential.

    Raises:
        NotAuthorisedError: there is none, or it is malformed.
    """
    try:
        return Credential.from_bytes(home.credential.read_bytes())
    except FileNotFoundError as e:
        raise NotAuthorisedError(
            f"home {home.path} belongs to no swarm",
            "found one with `xpeer init`, or join with `xpeer start --join TOKEN`",
        ) from e
    except OSError as e:
        raise ConfigError(f"{home.credential} can't be read: {e.strerror}", "check its mode") from e


def load_seeds(home: Home) -> list[str]:
    """The seeds that the token named.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        return msgspec.json.decode(home.seeds.read_bytes(), type=list[str])
    except FileNotFoundError:
        return []
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as e:
        raise ConfigError(f"{home.seeds} is damaged: {e}", "join again with a token") from e


def load_swarm_key(home: Home) -> bytes:
    """The swarm key, 32 bytes.

    Raises:
        ConfigError: its file is missing, readable by others, or of another length.
    """
    key = read_secret(home.swarm_key, "swarm key", "join again with a token")
    if len(key) != 32:
        raise ConfigError(
            f"swarm key {home.swarm_key} has {len(key)} bytes, not 32", "join again with a token"
        )
    return key


def refuse_second_swarm(home: Home) -> None:
    """Refuse a home that belongs to a swarm: like its ledger, it does so for ever."""
    parts = (home.manifest, home.credential, home.admin_key, home.swarm_key, home.initial_model)
    for path in parts:
        if path.exists():
            raise ConfigError(
                f"home {home.path} belongs to a swarm already ({path.name})",
                "choose another --home",
            )


def refuse_other_swarm(home: Home, swarm_id: str) -> None:
    """Refuse a home that belongs to another swarm. Joining the same swarm again is allowed."""
    if home.credential.exists():
        known = load_credential(home).claimed_swarm()
        if known != swarm_id:
            raise ConfigError(
                f"home {home.path} belongs to swarm {known[:16]}, the token to {swarm_id[:16]}",
                "choose another --home",
            )


def _identity_for(home: Home, new: Home) -> Identity:
    if home.identity_key.exists():
        return Identity.load(home.identity_key)
    identity = Identity.generate()
    identity.save(new.identity_key)
    return identity


def _sendable(signed: SignedManifest) -> bytes:
    """The signed manifest as bytes, after the checks that every member makes."""
    data = signed.to_bytes()
    if len(data) > MAX_MANIFEST_BYTES:
        raise ConfigError(
            f"the manifest has {len(data)} bytes, at most {MAX_MANIFEST_BYTES}",
            "give a shorter --public-text",
        )
    signed.open()
    return data


@contextmanager
def _beside(home: Home) -> Iterator[Home]:
    """Make a staging folder (`stage`). Its entries move into the home if the block succeeds."""
    with private_umask():
        yield from _staged(home)


@contextmanager
def scratch(home: Home) -> Iterator[Path]:
    """A folder within the block, on the disk that the home will be on.

    Raises:
        LocalError: it can't be made.
    """
    try:
        folder = stage(home)
    except OSError as e:
        where = room_for(home)
        remedy = "free space there, or choose another --home"
        if e.errno in NOT_OURS:
            remedy = f"make the folder {home.path} first, of this user; or choose another --home"
        raise LocalError(f"{where} can't be written: {e.strerror}", remedy) from e
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _staged(home: Home) -> Iterator[Home]:
    missing = [path for path in (home.path, *home.path.parents) if not path.exists()]
    make_folder(home.path if not missing else home.path.parent)
    moved: list[Path] = []
    staging: Path | None = None
    try:
        staging = stage(home)
        yield Home(staging)
        for entry in staging.rglob("*"):
            sync(entry)
        if missing:
            sync(staging)
            staging.replace(home.path)
            missing.clear()
            sync(home.path.parent)
        else:
            _move_into(staging, home, moved)
            sync(home.path)
    except OSError as e:
        for path in moved:
            _remove(path)
        raise LocalError(f"home {home.path} can't be written: {e}", "check disk and rights") from e
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        with contextlib.suppress(OSError):
            for path in missing:
                if path.exists():
                    path.rmdir()


def _move_into(staging: Path, home: Home, moved: list[Path]) -> None:
    """Move every entry, the credential last: only with it does the home belong to the swarm."""
    for entry in sorted(staging.iterdir(), key=lambda e: (e.name == home.credential.name, e.name)):
        target = home.path / entry.name
        fresh = not target.exists()
        entry.replace(target)
        if fresh:
            moved.append(target)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
