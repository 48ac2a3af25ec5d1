"""What a node says of itself, gathered from its parts: the answer of `xpeer status`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec

from xpeer import __version__
from xpeer.health import verdict
from xpeer.identity import PeerId
from xpeer.status import SHOUTED, Partner, PrivacySpent, Progress, Status

MAX_SHORT_CHARS = 500

if TYPE_CHECKING:
    from xpeer_daemon.node import Node
    from xpeer_daemon.store import Known


def status_of(node: Node) -> Status:
    """Everything an operator may want to know."""
    trainer, book, swarm, config = node.running(), node.book, node.swarm, node.config
    now, reasons = node.clock(), node.reasons()
    bytes_in, bytes_out = (swarm.meter.bytes_in, swarm.meter.bytes_out) if swarm else (0, 0)
    carried = book.payload_bytes_sent if book else 0
    progress, last = _progress(node, now), trainer or node.last_trainer
    return Status(
        health=verdict(reasons),
        reasons=reasons,
        state=node.state,
        peer_id=node.peer_id,
        name=config.network.name,
        swarm_id=node.swarm_id,
        swarm_name=node.manifest.name if node.manifest else "",
        version=__version__,
        pid=os.getpid(),
        uptime_s=now - node.started_s,
        addresses=swarm.addresses if swarm else [],
        num_params=last.num_params if last else _num_params(node),
        device=last.device if last else "",
        round=progress.window,
        progress=progress,
        progress_age_s=_age(now, node.known.unix_s) if node.known else None,
        trainer_runs=trainer is not None,
        eta_unix_s=eta_unix_s(node),
        corpus=last.corpus if last else None,
        shard=last.shard if last else None,
        privacy=_privacy(node),
        privacy_warning=SHOUTED.get(node.manifest.privacy.mode, "") if node.manifest else "",
        partners=_partner_rows(node, now),
        exchanges_done=book.exchanges if book else 0,
        exchanges_failed=dict(book.failures) if book else {},
        exchanges_skipped=dict(book.skips) if book else {},
        one_sided_merges=book.one_sided if book else 0,
        bytes_in=bytes_in,
        bytes_out=bytes_out,
        egress_cost=bytes_out / 1e9 * config.network.price_per_gb,
        currency=config.network.currency,
        compression_ratio=4 * book.values_sent / carried if book and carried else None,
        last_good_round_age_s=_age(now, node.last_exchange_s),
        last_checkpoint_age_s=_age(now, node.last_checkpoint_s),
        trainer_restarts=node.supervisor.restarts if node.supervisor else 0,
        sidecar_restarts=swarm.sidecar_restarts if swarm else 0,
        strangers_refused=swarm.strangers_refused if swarm else 0,
    )


def beginning(saved_step: int | None, known: Known | None) -> str:
    """At the daemon's start: whether it begins anew or goes on, and what was spent before.

    Args:
        saved_step: of the newest checkpoint; None = there is none.
        known: what a trainer said last, before this start.
    """
    spent = ""
    if known is not None and known.privacy is not None and known.privacy.mode != "off":
        privacy = known.privacy
        spent = (
            f"; epsilon {privacy.epsilon_spent:.3f} of {privacy.epsilon_target:g} was spent by then"
        )
    was = f"step {known.progress.step} was seen last{spent}" if known is not None else ""
    if saved_step is not None:
        return f"goes on from the checkpoint of step {saved_step}" + (f": {was}" if was else "")
    if known is not None and known.progress.step:
        return f"starts without a checkpoint, though not for the first time: {was}"
    return "starts fresh: no checkpoint, and no step was taken in this home"


def in_short(status: Status) -> str:
    """For systemd: health, what it does, and what is the matter."""
    alive = sum(partner.state == "alive" for partner in status.partners)
    what = f"{status.health}: {status.state}, step {status.progress.step}, {alive} partners"
    return "; ".join([what, *(reason.text for reason in status.reasons)])[:MAX_SHORT_CHARS]


def _progress(node: Node, now: float) -> Progress:
    """As the trainer said last, with ages of now."""
    trainer = node.running()
    if node.known is None:
        return trainer.progress if trainer else Progress()
    progress, since_s = node.known.progress, max(0.0, now - node.known.unix_s)
    return msgspec.structs.replace(
        progress,
        loss_train_age_s=_older(progress.loss_train_age_s, since_s),
        loss_measured_age_s=_older(progress.loss_measured_age_s, since_s),
    )


def eta_unix_s(node: Node) -> float | None:
    """When the last step will be taken: the run's, or the budget's if that comes first."""
    if node.known is None or not node.training():
        return None
    planned, step = node.known.progress.planned_steps, node.known.progress.step
    step_s = node.steps.step_s
    ends = [node.known.privacy.ends_unix_s] if node.known.privacy else []
    if planned is not None and step_s is not None:
        ends.append(node.known.unix_s + max(0, planned - step) * step_s)
    return min((end for end in ends if end is not None), default=None)


def _num_params(node: Node) -> int:
    return node.manifest.model.num_params if node.manifest else 0


def _privacy(node: Node) -> PrivacySpent:
    """As the trainer said last; before that, what the manifest says."""
    trainer = node.running()
    if node.known is not None and node.known.privacy is not None:
        return node.known.privacy
    if trainer is not None:
        return trainer.privacy
    return PrivacySpent(mode=node.manifest.privacy.mode if node.manifest else "record")


def _partner_rows(node: Node, now: float) -> list[Partner]:
    avoided = node.book.avoided(node.partners()) if node.book else frozenset()
    listed = node.others_listed()
    rows = []
    for peer, member in sorted(node.others().items()):
        record = node.book.get(peer) if node.book else None
        rows.append(
            msgspec.structs.replace(
                _known_of(node, peer, now),
                exchange_s=record.seconds if record else None,
                phase=member.phase,
                role=member.role,
                addresses=member.addresses,
                speed=member.speed or None,
                avoided_s=record.backoff.until_s - now if record and peer in avoided else 0.0,
                avoided_why=record.backoff.reason if record and peer in avoided else "",
                privacy=node.manifest.privacy.in_short() if node.manifest else "",
                bytes_in=record.payload_bytes if record else 0,
                bytes_out=record.payload_bytes if record else 0,
            )
        )
    missed = sorted(node.missed.lost(now).items(), key=lambda item: -item[1])  # the latest first
    return rows + [
        msgspec.structs.replace(_known_of(node, peer, now), state="missed", silent_s=now - seen_s)
        for peer, seen_s in missed
        if peer not in listed
    ]


def _known_of(node: Node, peer: PeerId, now: float) -> Partner:
    """What is known of a member, be it there or not."""
    record = node.book.get(peer) if node.book else None
    heard = node.acquaintances.get(peer)
    return Partner(
        peer_id=peer,
        name=heard.about.name if heard else "",
        step=heard.about.step if heard else None,
        step_age_s=_age(now, heard.at_s) if heard else None,
        exchanges=record.done if record else 0,
        failures=record.failed if record else 0,
        skipped=record.skipped if record else 0,
        last_reason=record.last_reason if record else "",
        ledger_went_back=record.went_back if record else "",
        ledger_caught_up=record.caught_up if record else False,
        last_exchange_age_s=_age(now, record.last_done_s) if record else None,
    )


def _age(now: float, then: float | None) -> float | None:
    return None if then is None else max(0.0, now - then)


def _older(age_s: float | None, by_s: float) -> float | None:
    return None if age_s is None else age_s + by_s
