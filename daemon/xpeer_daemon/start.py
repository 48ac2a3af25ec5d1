"""What `xpeer start` becomes: everything is checked, the home is locked, and the service lives."""

from __future__ import annotations

import logging
import os
import time

import uvloop

from xpeer import files, founding
from xpeer.config import Home, NodeConfig, note_of_foreign
from xpeer.errors import LocalError, NotAuthorisedError
from xpeer.manifest import SignedManifest
from xpeer.network.addresses import check_announce, peer_of, resolve_listen
from xpeer.network.invites import Token
from xpeer.training.child import PROGRAM
from xpeer.training.files import find
from xpeer_daemon import belonging, logs
from xpeer_daemon.lock import HomeLock
from xpeer_daemon.service import Service

log = logging.getLogger("xpeer.daemon")


def check(home: Home, config: NodeConfig, *, join_token: str | None) -> None:
    """Everything that can be found wrong without starting anything or writing to the disk.

    Raises:
        LocalError: the first problem.
    """
    files.secure(home, look_only=True)
    _check(home, config, join_token=join_token)


def _check(home: Home, config: NodeConfig, *, join_token: str | None) -> None:
    if join_token is None:
        credential = founding.load_credential(home)
        certificate = credential.verify(credential.claimed_swarm(), time.time())
        belonging.check_key(home, credential)
    else:
        certificate = Token.parse(join_token).certificate
    if certificate.role == "infrastructure":
        raise NotAuthorisedError(
            "the certificate is for a bootstrap node", "use it with `xpeer bootstrap --join`"
        )
    resolve_listen(config.network.listen)
    check_announce(config.network.announce)
    for seed in config.network.bootstrap:
        peer_of(seed)
    home.socket(config)
    if home.manifest.exists():
        manifest = SignedManifest.load(home.manifest).open()
        manifest.require_privacy(config.data.privacy, config.privacy.max_epsilon)
    belonging.check_parts(home, config, certificate)
    if certificate.role != "observer":
        data = config.data
        setting = "data.corpus" if data.corpus else "data.shard"
        find(data.corpus or data.shard, setting)  # only the trainer opens them


def run(
    home: Home,
    config: NodeConfig,
    *,
    join_token: str | None = None,
    paused: bool = False,
    trainer: str = PROGRAM,
) -> int:
    """Run the daemon until it is told to stop; the exit code.

    Raises:
        LocalError: it can't start, or can't go on.
    """
    closed = files.secure(home)
    if home.lock.exists():
        HomeLock.acquire(home).close()  # another daemon's port would look taken
    _check(home, config, join_token=join_token)
    if join_token is not None:
        founding.prepare_join(home, join_token)
    with HomeLock.acquire(home):
        logs.setup(home, config.daemon.log_level, config.daemon.log_format)
        for note in (*closed, note_of_foreign(os.environ)):
            if note:
                log.warning("%s", note)
        try:
            return uvloop.run(Service(home, config, paused=paused, trainer=trainer).main())
        except LocalError as e:
            log.error("%s", e)
            raise
        finally:
            logs.close()
