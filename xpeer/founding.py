"""What makes a home: a key, a new swarm, or the right to join one.

Everything is written beside the home first and moved in at the end: an error changes nothing.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from xpeer.config import Home
from xpeer.errors import ConfigError, LocalError, NotAuthorisedError
from xpeer.identity import Identity, read_secret, write_secret
from xpeer.manifest import Manifest, SignedManifest
from xpeer.network.invites import Token, grant
from xpeer.network.membership import Credential

FOUNDER_S = 10 * 365 * 86400.0


def ensure_identity(home: Home) -> Identity:
    """This node's key, made on first use."""
    if home.identity_key.exists():
        return Identity.load(home.identity_key)
    make_folder(home.path)
    identity = Identity.generate()
    identity.save(home.identity_key)
    return identity


def make_folder(path: Path) -> None:
    """A folder only its owner can enter.

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
    home: Home, manifest: Manifest, write_initial: Callable[[Path], None], config_text: str
) -> Founded:
    """Make a swarm and its first member.

    Args:
        home: holds no swarm yet.
        manifest: to be signed by a new admin key.
        write_initial: writes the initial model into the folder it is given.
        config_text: config.toml.

    Raises:
        ConfigError: the home belongs to a swarm already.
    """
    refuse_second_swarm(home)
    with _beside(home) as new:
        identity = _identity_for(home, new)
        admin = Identity.generate()
        admin.save(new.admin_key)
        write_secret(new.swarm_key, secrets.token_bytes(32))
        signed = SignedManifest.sign(manifest, admin)
        new.manifest.write_bytes(signed.to_bytes())
        certificate = grant(signed.genesis, identity.peer_id, "admin", FOUNDER_S, time.time())
        credential = Credential.issue(admin, certificate, identity.peer_id)
        new.credential.write_bytes(credential.to_bytes())
        write_initial(new.initial_model)
        new.config.write_text(config_text, encoding="utf-8")
    return Founded(identity.peer_id, signed.genesis.swarm_id, manifest)


def prepare_join(home: Home, token_text: str, config_text: str | None = None) -> Token:
    """Check a token and keep what it grants; the swarm key comes from a member at `start`.

    Args:
        home: holds no swarm yet, or the same swarm's manifest.
        token_text: what `xpeer invite create` printed.
        config_text: config.toml to write if there is none.

    Raises:
        NotAuthorisedError: damaged, expired, or for another PeerID.
        ConfigError: the home belongs to another swarm.
    """
    token = Token.parse(token_text)
    known = Identity.load(home.identity_key) if home.identity_key.exists() else None
    if known is None and not token.bearer:
        raise NotAuthorisedError(
            f"the token is for {token.certificate.subject}, and this home has no key",
            "give the admin the PeerID that `xpeer id` prints, and join with the token for it",
        )
    credential = token.credential_for(known or Identity.generate(), time.time())
    refuse_other_swarm(home, token.swarm_id)
    with _beside(home) as new:
        identity = _identity_for(home, new)
        credential = token.credential_for(identity, time.time())
        new.credential.write_bytes(credential.to_bytes())
        new.seeds.write_bytes(msgspec.json.encode(token.seeds))
        if config_text is not None and not home.config.exists():
            new.config.write_text(config_text, encoding="utf-8")
    return token


def keep_admission(home: Home, manifest: SignedManifest, swarm_key: bytes) -> None:
    """Keep what a member handed over."""
    with _beside(home) as new:
        new.manifest.write_bytes(manifest.to_bytes())
        write_secret(new.swarm_key, swarm_key)


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
    """Addresses that the token named.

    Raises:
        ConfigError: the file is damaged.
    """
    try:
        return msgspec.json.decode(home.seeds.read_bytes(), type=list[str])
    except FileNotFoundError:
        return []
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as e:
        raise ConfigError(f"{home.seeds} is damaged: {e}", "join again with a token") from e


def load_swarm_key(home: Home) -> bytes:
    """The 32 bytes that only members hold.

    Raises:
        ConfigError: missing, readable by others, or of another length.
    """
    key = read_secret(home.swarm_key, "swarm key", "join again with a token")
    if len(key) != 32:
        raise ConfigError(
            f"swarm key {home.swarm_key} has {len(key)} bytes, not 32", "join again with a token"
        )
    return key


def refuse_second_swarm(home: Home) -> None:
    """A home belongs to one swarm for ever: its ledger does."""
    for path in (home.manifest, home.credential, home.admin_key, home.swarm_key):
        if path.exists():
            raise ConfigError(
                f"home {home.path} belongs to a swarm already ({path.name})",
                "choose another --home",
            )


def refuse_other_swarm(home: Home, swarm_id: str) -> None:
    """Joining again with a fresh token is fine; joining another swarm is not."""
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


@contextmanager
def _beside(home: Home) -> Iterator[Home]:
    """A staging folder whose entries replace the home's, if the block succeeds."""
    existed = home.path.exists()
    make_folder(home.path.parent)
    staging = Path(tempfile.mkdtemp(prefix=f".{home.path.name}-", dir=home.path.parent))
    try:
        yield Home(staging)
        make_folder(home.path)
        for entry in sorted(staging.iterdir()):
            _sync(entry)
            target = home.path / entry.name
            if target.is_dir():
                shutil.rmtree(target)
            entry.replace(target)
        _sync(home.path)
    except OSError as e:
        if not existed and home.path.exists() and not any(home.path.iterdir()):
            home.path.rmdir()
        raise LocalError(f"home {home.path} can't be written: {e}", "check disk and rights") from e
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
