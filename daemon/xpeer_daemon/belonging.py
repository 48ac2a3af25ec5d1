"""Check that all parts of a home belong to one another, before anything is spent.

    identity.key - credential - manifest - swarm.key, admin.key
                                manifest - checkpoints - ledger - register

A home may be restored from backups, moved between machines, and edited by hand. Each part may be
whole and yet belong to another home. Nothing here writes, and nothing needs a model: only the
header of a checkpoint is read.

A ledger or a register that was restored from an older copy passes: at its start the trainer charges
each of them what the other knows (`accounts.register`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from xpeer import founding
from xpeer.accounts.bound import refuse_another
from xpeer.accounts.ledger import Ledger
from xpeer.accounts.register import Register
from xpeer.config import Home, NodeConfig, privacy_register
from xpeer.errors import ConfigError, LocalError, NotAuthorisedError
from xpeer.identity import Identity
from xpeer.leaves import Local, Public, seen_by
from xpeer.manifest import Manifest
from xpeer.manifest.signed import SignedManifest, swarm_key_digest
from xpeer.network.membership.certificates import Certificate, Credential

_CHECKPOINT: Final = re.compile(r"ckpt-\d{9,}\.safetensors")
_HEADER_BYTES_MAX: Final = 100_000_000
"""Limit of the safetensors format."""


@seen_by("home")
class _Bindings(Struct, frozen=True):
    """The part of a checkpoint's header that binds it to the home's other parts."""

    ledger_id: Local[str]
    manifest_hash: Public[str]


def check_parts(home: Home, config: NodeConfig, certificate: Certificate) -> None:
    """Refuse a home with a part that belongs to another one.

    Args:
        home: may lack parts that its first start brings.
        config: of the node.
        certificate: verified; of the home's credential, or of the token with which it joins.

    Raises:
        NotAuthorisedError: a key, the credential or the manifest belongs to another home.
        ConfigError: a checkpoint, the ledger or the register belongs to another home.
        LocalError: a part is damaged, or the ledger is missing.
    """
    swarm_id = certificate.genesis.swarm_id
    manifest: Manifest | None = None
    if home.manifest.exists():
        manifest = _manifest(home, swarm_id)
        _check_swarm_key(home, manifest)
    if home.admin_key.exists():
        _check_admin_key(home, certificate)
    _check_training(home, config, certificate, manifest)


def check_key(home: Home, credential: Credential) -> None:
    """Refuse a credential that is for another key than the home's.

    Raises:
        NotAuthorisedError: it is for another key.
        ConfigError: the home has no key, or it can't be read.
    """
    key = Identity.load(home.identity_key).peer_id
    if credential.peer_id != key:
        raise NotAuthorisedError(
            f"the credential is for {credential.peer_id}, this key is {key}",
            f"restore {home.identity_key} from a backup; without one, ask an admin for an "
            f"invitation for {key} and join with it (`xpeer start --join TOKEN`)",
        )


def _manifest(home: Home, swarm_id: str) -> Manifest:
    signed = SignedManifest.load(home.manifest)
    if signed.genesis.swarm_id != swarm_id:
        raise NotAuthorisedError(
            f"{home.manifest} is of swarm {signed.genesis.swarm_id[:16]}, the credential of "
            f"{swarm_id[:16]}",
            "restore the one that belongs to the other, or join anew in another home",
        )
    return signed.open(swarm_id)


def _check_swarm_key(home: Home, manifest: Manifest) -> None:
    key = founding.load_swarm_key(home)
    if manifest.swarm_key_digest and swarm_key_digest(key) != manifest.swarm_key_digest:
        raise NotAuthorisedError(
            f"{home.swarm_key} is the key of another swarm than {home.manifest}",
            "restore it from a backup, or join again with a token",
        )


def _check_admin_key(home: Home, certificate: Certificate) -> None:
    admin = Identity.load(home.admin_key)
    if bytes(admin.verify_key) != certificate.genesis.admin:
        raise NotAuthorisedError(
            f"{home.admin_key} is the key of another swarm than the credential",
            "restore it from a backup; nobody could join with what it signs",
        )


def _check_training(
    home: Home, config: NodeConfig, certificate: Certificate, manifest: Manifest | None
) -> None:
    newest = _newest(home.checkpoints)
    ledger_id = ""
    if newest is not None:
        path, bindings, num_params = newest
        expected = certificate.genesis.manifest_hash.hex()
        if bindings.manifest_hash != expected:
            raise ConfigError(
                f"{path} is of manifest {bindings.manifest_hash[:16]}, this swarm's is "
                f"{expected[:16]}",
                "restore this home's checkpoints, or move them away",
            )
        if manifest is not None and num_params not in (None, manifest.model.num_params):
            raise ConfigError(
                f"{path} has {num_params} parameters, the manifest {manifest.model.num_params}",
                "restore this home's checkpoints, or move them away",
            )
        ledger_id = bindings.ledger_id
    if not home.ledger_db.exists():
        if ledger_id:
            raise LocalError(
                f"privacy ledger {home.ledger_db} is missing, but {newest and newest[0]} was made "
                f"with {ledger_id}",
                "restore it from a copy made after the last training step; without one, take the "
                "budget of this shard as spent",
            )
        return
    with Ledger.look(home.ledger_db) as ledger:
        if ledger_id and ledger.id != ledger_id:
            raise ConfigError(
                f"privacy ledger {home.ledger_db} is {ledger.id[:16]}, but {newest and newest[0]} "
                f"was charged to {ledger_id[:16]}",
                "restore the ledger that belongs to the checkpoint: another would spend the "
                "privacy of the shard twice",
            )
        if manifest is None or manifest.privacy.policy.charges:
            folder = privacy_register(config)
            refuse_another(ledger, folder)
            register = Register.look(folder)  # raises if it is damaged
            if register is not None:
                register.close()


def _newest(folder: Path) -> tuple[Path, _Bindings, int | None] | None:
    """The newest checkpoint whose header can be read. The trainer verifies its values later."""
    try:
        paths = [path for path in folder.iterdir() if _CHECKPOINT.fullmatch(path.name)]
    except OSError:  # there are none, or the trainer says what is wrong with the folder
        return None
    for path in sorted(paths, key=lambda each: int(each.name[5:].split(".")[0]), reverse=True):
        header = _header(path)
        try:
            metadata = header["__metadata__"]["xpeer"]
            bindings = msgspec.json.decode(metadata, type=_Bindings)
            return path, bindings, int(header["flat"]["shape"][0])
        except (KeyError, IndexError, TypeError, ValueError, msgspec.MsgspecError):
            continue
    return None


def _header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > _HEADER_BYTES_MAX:
                return {}
            header = msgspec.json.decode(file.read(size))
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return {}
    return header if isinstance(header, dict) else {}
