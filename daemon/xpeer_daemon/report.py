"""What a node says of itself, gathered from its parts: the answer of `xpeer status`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from xpeer import __version__
from xpeer.health import verdict
from xpeer.status import SHOUTED, Partner, PrivacySpent, Progress, Status

if TYPE_CHECKING:
    from xpeer_daemon.node import Node


def status_of(node: Node) -> Status:
    """Everything an operator may want to know."""
    trainer, book, swarm, config = node.running(), node.book, node.swarm, node.config
    now, reasons = node.clock(), node.reasons()
    bytes_in, bytes_out = (swarm.meter.bytes_in, swarm.meter.bytes_out) if swarm else (0, 0)
    carried = book.payload_bytes_sent if book else 0
    return Status(
        health=verdict(reasons),
        reasons=reasons,
        state=node.state,
        peer_id=node.peer_id,
        swarm_id=node.swarm_id,
        swarm_name=node.manifest.name if node.manifest else "",
        version=__version__,
        pid=os.getpid(),
        uptime_s=now - node.started_s,
        addresses=swarm.addresses if swarm else [],
        num_params=trainer.num_params if trainer else 0,
        device=trainer.device if trainer else "",
        round=trainer.progress.window if trainer else 0,
        progress=trainer.progress if trainer else Progress(),
        corpus=trainer.corpus if trainer else None,
        privacy=trainer.privacy if trainer else _privacy_without_trainer(node),
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


def _privacy_without_trainer(node: Node) -> PrivacySpent:
    return PrivacySpent(mode=node.manifest.privacy.mode if node.manifest else "record")


def _partner_rows(node: Node, now: float) -> list[Partner]:
    rows = []
    avoided = node.book.avoided(node.partners()) if node.book else frozenset()
    for peer, member in sorted(node.others().items()):
        record = node.book.get(peer) if node.book else None
        rows.append(
            Partner(
                peer_id=peer,
                phase=member.phase,
                role=member.role,
                addresses=member.addresses,
                speed=member.speed,
                exchanges=record.done if record else 0,
                failures=record.failed if record else 0,
                skipped=record.skipped if record else 0,
                last_reason=record.last_reason if record else "",
                avoided_s=record.backoff.until_s - now if record and peer in avoided else 0.0,
                avoided_why=record.backoff.reason if record and peer in avoided else "",
                ledger_went_back=record.went_back if record else "",
                ledger_caught_up=record.caught_up if record else False,
                privacy=node.manifest.privacy.in_short() if node.manifest else "",
                last_exchange_age_s=_age(now, record.last_done_s) if record else None,
                bytes_in=record.payload_bytes if record else 0,
                bytes_out=record.payload_bytes if record else 0,
            )
        )
    return rows


def _age(now: float, then: float | None) -> float | None:
    return None if then is None else max(0.0, now - then)
