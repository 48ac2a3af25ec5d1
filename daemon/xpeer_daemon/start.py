"""The start of a daemon: everything is checked, the home is locked, and the service runs."""

from __future__ import annotations

import contextlib
import logging
import os
import time

import uvloop

from xpeer import files, founding, needs
from xpeer.accounts import accountant
from xpeer.accounts.account_view import AccountView
from xpeer.accounts.bound import look_at_register
from xpeer.accounts.ledger import Ledger
from xpeer.accounts.trained import has_trained
from xpeer.config import Home, NodeConfig, privacy_register
from xpeer.config_sources import note_of_foreign
from xpeer.errors import LocalError, NotAuthorisedError, ShardError
from xpeer.manifest.signed import SignedManifest
from xpeer.network.addresses import resolve_listen
from xpeer.network.membership.certificates import Certificate
from xpeer.network.membership.invites import Token
from xpeer.readiness import check_settings
from xpeer.trainer.child import PROGRAM
from xpeer.training.checkpoint_files import paths, step_of
from xpeer.training.files import find
from xpeer_daemon import belonging, logs, service
from xpeer_daemon.lock import HomeLock
from xpeer_daemon.member import Options

log = logging.getLogger("xpeer.daemon")


def check(home: Home, config: NodeConfig, *, join_token: str | None) -> Certificate:
    """Check everything that can be checked without starting anything or writing to the disk.

    Returns:
        This node's certificate.

    Raises:
        LocalError: the first problem.
    """
    files.secure(home, look_only=True)
    return _check(home, config, join_token=join_token)


def _check(home: Home, config: NodeConfig, *, join_token: str | None) -> Certificate:
    check_settings(home, config)
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
    if home.manifest.exists():
        manifest = SignedManifest.load(home.manifest).open()
        manifest.require_privacy(config.data.privacy, config.privacy.max_epsilon)
    belonging.check_parts(home, config, certificate)
    if certificate.role != "observer":
        data = config.data
        needs.require(_needs(home, join_token), data, home)
        setting = "data.corpus" if data.corpus else "data.shard"
        try:
            find(data.corpus or data.shard, setting)  # only the trainer opens the files
        except ShardError:
            if not (data.corpus or data.shard) or not has_trained(home):
                raise  # a node that has trained goes on: its text may be there again soon
    return certificate


def _needs(home: Home, join_token: str | None) -> needs.Needs | None:
    """Files and packages that members need: by the manifest, or by the token until there is one."""
    if home.manifest.exists():
        return needs.Needs.of(SignedManifest.load(home.manifest).open())
    return Token.parse(join_token).needs if join_token is not None else None


def beginning(home: Home, now_unix_s: float, config: NodeConfig | None = None) -> str:
    """Describe how training starts: fresh or from a checkpoint, and with how much privacy spent.

    What was spent is counted from the home's ledger and the machine's register.
    """
    saved = paths(home.checkpoints)
    if saved:
        minutes = max(0.0, now_unix_s - saved[0].stat().st_mtime) / 60
        start = f"resumes from step {step_of(saved[0]):,}, saved {minutes:,.0f} min ago"
    elif home.initial_model.exists():
        start = "starts fresh, from the swarm's initial model"
    else:
        start = "starts fresh, from the parameters of a member"
    if not home.ledger_db.exists():
        return f"{start}; no privacy was spent by this home"
    with contextlib.ExitStack() as opened:
        ledger, unread = opened.enter_context(Ledger.look(home.ledger_db)), ""
        try:
            register = look_at_register(ledger, privacy_register(config or NodeConfig()))
        except LocalError as e:  # the trainer raises it, if it needs the register
            register, unread = None, f"; by the ledger alone: {e.problem}"
        account = AccountView(ledger, opened.enter_context(register) if register else None)
        steps = sum(segment.steps for segment in account.charged)
        charges = ledger.charges()
        about = charges[-1].about if charges else None
        if about is None:
            return f"{start}; {steps:,} private steps were charged to this home{unread}"
        spent = accountant.epsilon_worst(account.of_shard(), about.delta)
    return (
        f"{start}; {steps:,} private steps were charged to this home, epsilon {spent:.3g} of "
        f"{about.epsilon_target:g} (delta {about.delta:.1e}){unread}"
    )


def run(
    home: Home,
    config: NodeConfig,
    *,
    join_token: str | None = None,
    paused: bool = False,
    from_initial: bool = False,
    accept_donor: str | None = None,
    trainer: str = PROGRAM,
) -> int:
    """Run the daemon until it is asked to stop.

    Returns:
        The exit code.

    Raises:
        LocalError: it can't start, or can't go on.
    """
    closed = files.secure(home)
    if home.lock.exists():
        HomeLock.acquire(home).close()  # without this a running daemon would show as a port in use
    _check(home, config, join_token=join_token)
    if join_token is not None:
        founding.prepare_join(home, join_token)
    with HomeLock.acquire(home):
        logs.setup(home, config.daemon.log_level, config.daemon.log_format)
        log.info("%s", beginning(home, time.time(), config))
        for note in (*closed, note_of_foreign(os.environ)):
            if note:
                log.warning("%s", note)
        try:
            options = Options(
                paused=paused,
                from_initial=from_initial,
                accept_donor=accept_donor,
                trainer=trainer,
            )
            return uvloop.run(service.run(home, config, options))
        except LocalError as e:
            log.error("%s", e)
            raise
        finally:
            logs.close()
