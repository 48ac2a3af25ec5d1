"""What is the matter with a node, as far as it follows from what the node is: looked at anew each
time it is asked.

What only the job itself knows (a failed write) is noted by the job, in `Node.health`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from xpeer.health import duration
from xpeer.identity import PeerId
from xpeer.privacy import signal
from xpeer.status import PrivacySpent, Progress
from xpeer_daemon.phases import ENDED, EXCHANGING

if TYPE_CHECKING:
    from xpeer_daemon.node import Node

STALE_ROUNDS = 20
"""No good exchange for this many windows' slots, with partners alive: degraded."""
MIN_STALE_S = 60.0
_BEGINNINGS = {
    "starting": "starting",
    "joining": "joining",
    "fetching": "fetching",
    "waiting": "waiting-for-peers",
}
"""Conditions by state."""
RESTING_S = 1.0
"""A shorter rest between two steps is not worth a word."""
ACTIVE = EXCHANGING | {"fetching", "waiting"}
"""Phases of members that the end waits for, unless they have ended."""
LEAST_STEP_S, FIRST_STEP_S = 120.0, 900.0
"""No step for so long is no normal step; the first one may measure engines and compile."""
SLOW_STEPS = 10.0
"""... nor is one that takes so many times as long as the others did."""
LATE_EVALUATION_S = 3600.0
"""Losses that were measured so long ago tell little."""
LATE_CHECKPOINTS = 3.0
"""Intervals without a checkpoint."""
MAX_CLOCK_S = 2.0
"""Beyond 3 s hivemind refuses a peer."""
RENEWAL_S = 7 * 86400.0
RENEWAL_SHARE = 0.1
"""A certificate is renewed in time: so long before its end, or this share of its lifetime if that
is longer; a short-lived one in its second half."""
NAMED = 4
"""Members that a reason names; more are counted."""
_DATE = "%Y-%m-%d %H:%M UTC"


def observe(node: Node) -> None:
    """Note in the node's health what can be seen of it now."""
    now = node.clock()
    _life(node)
    _certificate(node, now)
    _trainer(node, now)
    _losses(node, now)
    _network(node)
    _exchanges(node, now)
    _members(node, now)


def _life(node: Node) -> None:
    health, state = node.health, node.state
    for known, code in _BEGINNINGS.items():
        note = node.joining_note or f"state is {known}"
        now = state if state != "joining" or node.manifest is None else "starting"
        health.hold(code, now == known, note=note)
    needed = node.config.training.min_peers
    if state == "waiting" and len(node.present()) < needed:
        note = f"waiting for training.min_peers = {needed}: {who_is_there(node)}"
        health.set("waiting-for-peers", note=note)
    health.hold("stopping", state == "stopping")
    health.hold("paused", state == "paused")
    trainer = node.running()
    rest_s = trainer.resting_s if trainer is not None and node.training() else 0.0
    health.hold("resting", rest_s >= RESTING_S, rest_s=rest_s)
    health.hold("budget-spent", node.budget_spent)
    spent = trainer.privacy if trainer is not None else PrivacySpent()
    steps = trainer.progress.planned_steps if trainer is not None else None
    drowns = spent.mode == "record" and signal.drowns(spent.noise_norm, steps)
    health.hold("noise-drowns-signal", drowns, norm=spent.noise_norm)
    health.hold("run-had-ended", not node.budget_spent and _came_too_late(node))


def _certificate(node: Node, now: float) -> None:
    health, certificate = node.health, node.certificate
    if certificate is None:
        return
    ends_s = certificate.not_after_unix_s
    lifetime_s = ends_s - certificate.not_before_unix_s
    soon_s = ends_s - min(max(RENEWAL_S, RENEWAL_SHARE * lifetime_s), lifetime_s / 2)
    left, ends = duration(max(0.0, ends_s - now)), time.strftime(_DATE, time.gmtime(ends_s))
    health.hold("certificate-expiring", soon_s <= now < ends_s, left=left, ends=ends)
    health.hold("certificate-expired", now >= ends_s, ends=ends)
    if now >= ends_s:
        health.began("certificate-expired", ends_s)


def who_is_there(node: Node) -> str:
    """Live members by phase, and how many of them count as being there."""
    others, present = node.others(), node.present()
    phases = Counter(record.phase for record in others.values())
    each = ", ".join(f"{count} {phase}" for phase, count in sorted(phases.items()))
    return f"{len(present)} of {len(others)} live members are there" + (
        f" ({each})" if each else ""
    )


def _came_too_late(node: Node) -> bool:
    """Whether none of this node's text was used, and none will be."""
    trainer = node.running()
    if node.state not in ENDED or trainer is None:
        return False
    return trainer.progress.tokens == 0 and not trainer.privacy.steps_charged


def _trainer(node: Node, now: float) -> None:
    health, supervisor, trainer = node.health, node.supervisor, node.running()
    if supervisor is not None and supervisor.down_reason:
        health.set("trainer-down", why=supervisor.down_reason)
    else:
        health.clear("trainer-down")
    step = node.known.progress.step if node.known else 0
    again = node.died_at_step is not None and trainer is not None
    health.hold("steps-lost", again, at=node.died_at_step, step=step)

    at_work = node.state == "training" and trainer is not None
    resting = trainer is not None and trainer.resting_s > 0
    patience_s, since_s = FIRST_STEP_S, node.since_s
    if node.steps.last_step_s is not None:
        patience_s = max(LEAST_STEP_S, SLOW_STEPS * (node.steps.step_s or 0.0))
        since_s = max(since_s, node.steps.last_step_s)
    still = at_work and not resting and now - since_s > patience_s
    health.hold("no-step", still, silent_s=now - since_s)

    every_s = node.config.checkpoint.every_s
    saved_s = max(node.last_checkpoint_s or 0.0, node.since_s)
    late = at_work and now - saved_s > LATE_CHECKPOINTS * every_s + LEAST_STEP_S
    health.hold("checkpoint-late", late, late_s=now - saved_s, every_s=every_s)


def _losses(node: Node, now: float) -> None:
    health, trainer, known = node.health, node.running(), node.known
    progress = known.progress if known is not None else Progress()
    problem = node.evaluation_problem or progress.loss_problem
    health.hold("evaluation-failing", trainer is not None and bool(problem), why=problem)

    late_s = now - node.since_s
    if known is not None and progress.loss_measured_age_s is not None:
        late_s = min(late_s, progress.loss_measured_age_s + now - known.unix_s)
    at_work = node.state == "training" and trainer is not None
    late = at_work and late_s > LATE_EVALUATION_S
    health.hold("evaluation-late", late, late=duration(late_s))


def _network(node: Node) -> None:
    swarm, health = node.swarm, node.health
    health.hold("sidecar-down", swarm is not None and not swarm.sidecar_alive)
    silence = swarm.bootstrapping.silent_seeds if swarm is not None else ""
    health.hold("no-seed", bool(silence), why=silence)
    ahead_s = swarm.bootstrapping.clock_ahead_s if swarm is not None else 0.0
    how = f"{abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'}"
    clocks = swarm.bootstrapping.clocks if swarm is not None else 0
    health.hold("clock-off", abs(ahead_s) > MAX_CLOCK_S, how=how, clocks=clocks)


def _exchanges(node: Node, now: float) -> None:
    health, partners, book = node.health, node.partners(), node.book
    refusing = set(book.refusing_our_ledger()) if book is not None else set()
    behind = [peer for peer in partners if peer in refusing]
    health.hold("ledger-behind", bool(behind), refusing=len(behind), who=names(node, behind))
    exchanging = node.state in EXCHANGING and node.state != "finished"
    health.hold("no-partner", exchanging and not partners)
    slot_s = node.manifest.round.slot_s if node.manifest else 1.0
    silent_s = now - (node.last_exchange_s or node.started_s)
    silent = exchanging and bool(partners) and silent_s > max(MIN_STALE_S, STALE_ROUNDS * slot_s)
    health.hold("no-exchange", silent, silent_s=silent_s)
    if not exchanging:
        health.clear("exchange-failed")


def _members(node: Node, now: float) -> None:
    health = node.health
    if node.roster is not None:
        node.missed.look(node.others_listed(), now)
    lost = node.missed.lost(now)
    exchanging = node.state in EXCHANGING and node.state != "finished"
    longest_first = sorted(lost, key=lost.__getitem__)
    who = names(node, longest_first, {p: f"for {duration(now - s)}" for p, s in lost.items()})
    missing = exchanging and bool(lost)
    health.hold("partners-lost", missing, lost=len(lost), known=node.missed.known, who=who)

    training = [
        peer
        for peer, record in node.others().items()
        if record.role != "observer" and record.phase in ACTIVE and record.phase not in ENDED
    ]
    waiting = node.state in ("closing", "budget-spent") and bool(training)
    phases = {peer: f"still {node.others()[peer].phase}" for peer in training}
    waited_s = duration(now - node.since_s)
    who = names(node, sorted(training), phases)
    health.hold("waiting-for-the-end", waiting, waited=waited_s, who=who)


def names(node: Node, peers: Sequence[PeerId], more: Mapping[PeerId, str] | None = None) -> str:
    """Some members, each with a word more about it."""
    said = more or {}
    each = [
        node.name_of(peer) + (f" ({said[peer]})" if peer in said else "") for peer in peers[:NAMED]
    ]
    left = f" and {len(peers) - NAMED} more" if len(peers) > NAMED else ""
    return ", ".join(each) + left
