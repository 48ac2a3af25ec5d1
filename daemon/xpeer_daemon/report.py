"""The answer of `xpeer status`, gathered from the parts of a node."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec

from xpeer import __version__
from xpeer.gossip.record import LedgerState
from xpeer.health import verdict
from xpeer.identity import PeerId
from xpeer.phase import Phase
from xpeer.status import Partner, PrivacySpent, Progress, Status
from xpeer.trainer.answers import UNREADY

MAX_SHORT_CHARS = 500

if TYPE_CHECKING:
    from xpeer_daemon.member import Member
    from xpeer_daemon.node import Node
    from xpeer_daemon.store import Known


def status_of(node: Node) -> Status:
    """Everything that an operator may want to know."""
    now, reasons, swarm = node.clock(), node.reasons(), node.swarm
    meter, config, record = swarm.meter, node.config, node.record
    last = node.running() or record.last_trainer
    facts = last.facts if last else UNREADY
    progress = _progress(node, now)
    status = Status(
        health=verdict(reasons),
        reasons=reasons,
        state=node.phase,
        peer_id=node.peer_id,
        name=config.network.name,
        swarm_id=node.certificate.genesis.swarm_id,
        version=__version__,
        pid=os.getpid(),
        uptime_s=now - node.started_s,
        addresses=swarm.addresses,
        num_params=facts.num_params,
        device=facts.device,
        precision=facts.precision,
        round=progress.window,
        progress=progress,
        progress_age_s=_age(now, record.known.unix_s) if record.known else None,
        trainer_runs=node.running() is not None,
        eta_unix_s=eta_unix_s(node),
        fetching=node.life.fetching() if node.life.fetching is not None else None,
        corpus=facts.corpus,
        shard=facts.shard,
        tokenising=record.starting.text if record.starting else None,
        privacy=_privacy(node),
        bytes_in=meter.bytes_in,
        bytes_out=meter.bytes_out,
        egress_cost=meter.bytes_out / 1e9 * config.network.price_per_gb,
        currency=config.network.currency,
        last_checkpoint_age_s=_age(now, record.saved_s),
        sidecar_restarts=swarm.sidecar_restarts,
        strangers_refused=swarm.strangers_refused + swarm.direct.strangers,
    )
    return status if node.member is None else _of_member(status, node, node.member, now)


def _of_member(status: Status, node: Node, member: Member, now: float) -> Status:
    """Add what only an admitted node knows."""
    partners, manifest = member.partners, member.manifest
    carried = partners.payload_bytes_sent
    return msgspec.structs.replace(
        status,
        swarm_name=manifest.name,
        num_params=status.num_params or manifest.model.num_params,
        privacy_warning=manifest.privacy.policy.warning,
        partners=_partner_rows(member, now),
        joiners=member.turns.joiners,
        exchanges_done=partners.exchanges,
        exchanges_failed=dict(partners.failures),
        exchanges_skipped=dict(partners.skips),
        one_sided_merges=partners.one_sided,
        compression_ratio=4 * partners.values_sent / carried if carried else None,
        last_good_round_age_s=_age(now, partners.last_done_s),
        trainer_restarts=member.supervisor.restarts,
    )


def beginning(saved_step: int | None, known: Known | None) -> str:
    """Describe for the log how the daemon starts: anew or from a checkpoint, and the budget spent.

    Args:
        saved_step: step of the newest checkpoint; None = there is none.
        known: what a trainer said last, before this start; None = nothing.
    """
    spent = ""
    privacy = known.privacy if known is not None else None
    if privacy is not None and privacy.policy.charges:
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
    """A line for systemd: health, state, step, number of partners, and the reasons' texts."""
    alive = sum(partner.state == "alive" for partner in status.partners)
    what = f"{status.health}: {status.state}, step {status.progress.step}, {alive} partners"
    return "; ".join([what, *(reason.text for reason in status.reasons)])[:MAX_SHORT_CHARS]


def _progress(node: Node, now: float) -> Progress:
    """The trainer's last counters, with ages up to date."""
    trainer, known = node.running(), node.record.known
    if known is None:
        return trainer.progress if trainer else Progress()
    progress, since_s = known.progress, max(0.0, now - known.unix_s)
    return msgspec.structs.replace(
        progress,
        loss_train_age_s=_older(progress.loss_train_age_s, since_s),
        loss_measured_age_s=_older(progress.loss_measured_age_s, since_s),
    )


def eta_unix_s(node: Node) -> float | None:
    """When the last step will be taken, the run's or the budget's, whichever is first.

    None = unknown, or the node does not train.
    """
    known = node.record.known
    if known is None or node.phase is not Phase.TRAINING:
        return None
    planned, step = known.progress.planned_steps, known.progress.step
    step_s = node.record.steps.step_s
    ends = [known.privacy.ends_unix_s] if known.privacy else []
    if planned is not None and step_s is not None:
        ends.append(known.unix_s + max(0, planned - step) * step_s)
    return min((end for end in ends if end is not None), default=None)


def _privacy(node: Node) -> PrivacySpent:
    """What the trainer last said of the budget; until it does, the manifest's mode alone."""
    trainer, known = node.running(), node.record.known
    if known is not None and known.privacy is not None:
        return known.privacy
    if trainer is not None:
        return trainer.privacy
    return PrivacySpent(mode=node.member.manifest.privacy.mode if node.member else "record")


def _partner_rows(member: Member, now: float) -> list[Partner]:
    view, privacy = member.view, member.manifest.privacy.in_short()
    avoided = member.partners.avoided(view.partners())
    listed = view.others_listed()
    rows = []
    for peer, card in sorted(view.others().items()):
        record = member.partners.get(peer)
        rows.append(
            msgspec.structs.replace(
                _known_of(member, peer, now),
                exchange_s=record.seconds if record else None,
                phase=card.phase,
                role=card.role,
                addresses=card.addresses,
                speed=card.speed or None,
                avoided_s=record.backoff.until_s - now if record and peer in avoided else 0.0,
                avoided_why=record.backoff.reason if record and peer in avoided else "",
                privacy=privacy,
                bytes_in=record.payload_bytes if record else 0,
                bytes_out=record.payload_bytes if record else 0,
            )
        )
    missed = sorted(view.missed.lost(now).items(), key=lambda item: -item[1])  # the latest first
    return rows + [
        msgspec.structs.replace(_known_of(member, peer, now), state="missed", silent_s=now - seen_s)
        for peer, seen_s in missed
        if peer not in listed
    ]


def _known_of(member: Member, peer: PeerId, now: float) -> Partner:
    """What we know of a member, whether it is alive or missed."""
    record = member.partners.get(peer)
    heard = member.view.acquaintances.get(peer)
    return Partner(
        peer_id=peer,
        name=heard.about.name if heard else "",
        step=heard.about.step if heard else None,
        step_age_s=_age(now, heard.at_s) if heard else None,
        exchanges=record.done if record else 0,
        failures=record.failed if record else 0,
        skipped=record.skipped if record else 0,
        last_reason=record.last_reason if record else "",
        ledger_went_back=record.ledger.detail if record else "",
        ledger_caught_up=record is not None and record.ledger.state is LedgerState.CAUGHT_UP,
        last_exchange_age_s=_age(now, record.last_done_s) if record else None,
    )


def _age(now: float, then: float | None) -> float | None:
    return None if then is None else max(0.0, now - then)


def _older(age_s: float | None, by_s: float) -> float | None:
    return None if age_s is None else age_s + by_s
