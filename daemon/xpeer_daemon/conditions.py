"""Conditions of a node that can be seen from its state. They are examined anew for every status.

A condition that only a job knows of (a failed write) is noted by that job, in `Node.health`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from xpeer.accounts import signal
from xpeer.gossip import pace
from xpeer.health import duration
from xpeer.identity import PeerId
from xpeer.phase import Phase
from xpeer.status import PrivacySpent, Progress

if TYPE_CHECKING:
    from xpeer.trainer.answers import Ready
    from xpeer_daemon.member import Member
    from xpeer_daemon.node import Node
    from xpeer_daemon.swarm_view import SwarmView

STALE_ROUNDS = 20
"""A node with partners is degraded if no exchange was done for this many slots, ..."""
MIN_STALE_S = 60.0
"""... for this long, ..."""
STALE_EXCHANGES = 4
"""... and for the time in which this many exchanges were due."""
_BEGINNINGS = {
    Phase.STARTING: "starting",
    Phase.JOINING: "joining",
    Phase.FETCHING: "fetching",
    Phase.WAITING: "waiting-for-peers",
}
"""Condition of each phase before training."""
RESTING_S = 1.0
"""Shorter rests between two steps are not mentioned."""
LEAST_STEP_S, FIRST_STEP_S = 120.0, 900.0
"""A shorter time without a step is normal. The first step may measure engines and compile."""
SLOW_STEPS = 10.0
"""... and so is a time that is shorter than this many of the node's steps."""
LATE_EVALUATION_S = 3600.0
"""Losses should not be older than this."""
LATE_CHECKPOINTS = 3.0
"""A checkpoint is late after this many of its intervals."""
MAX_CLOCK_S = 2.0
"""Largest difference of the clocks without a condition. Beyond 3 s hivemind refuses a peer."""
RENEWAL_S = 7 * 86400.0
RENEWAL_SHARE = 0.1
"""The operator is reminded of a certificate's end this long before it, or this fraction of its
lifetime if that is longer; in the second half of its lifetime at the earliest."""
MISALIGNED = 0.05
"""Fraction of the adapters' work that averaging may lose: 3.6% cost 0.002 nats, 47% cost 0.34."""
NAMED = 4
"""Number of members that a reason names; the others are only counted."""
_DATE = "%Y-%m-%d %H:%M UTC"


def observe(node: Node) -> None:
    """Examine the node, and set or clear conditions in its health."""
    now = node.clock()
    _life(node)
    _certificate(node, now)
    _text(node)
    _trainer(node, now)
    _losses(node, now)
    _network(node)
    if node.member is not None:
        _exchanges(node, node.member, now)
        _members(node, node.member, now)


def _life(node: Node) -> None:
    health, phase, life = node.health, node.phase, node.life
    wasted = f"; {life.wasted}" if life.wasted else ""
    note = life.note or "members are asked for the loss of their parameters"
    health.hold("catching-up", life.compares, note=note + wasted)
    for known, code in _BEGINNINGS.items():
        starting = node.record.starting
        note = (life.note or f"state is {known}") + wasted
        if starting is not None:
            note = f"the trainer {starting.stage}"
        now = phase if phase is not Phase.JOINING or node.member is None else Phase.STARTING
        health.hold(code, now is known, note=note)
    needed, member = node.config.training.min_peers, node.member
    if member is not None and phase is Phase.WAITING and len(member.view.present()) < needed:
        note = f"waiting for training.min_peers = {needed}: {who_is_there(member)}"
        health.set("waiting-for-peers", note=note)
    health.hold("stopping", phase is Phase.STOPPING)
    health.hold("paused", phase is Phase.PAUSED)
    health.hold("budget-spent", node.record.budget_spent)
    health.hold("run-had-ended", not node.record.budget_spent and _came_too_late(node))


def _text(node: Node) -> None:
    """Note whether the trainer rests, and whether the noise drowns the text's signal."""
    health, trainer = node.health, node.running()
    rest_s = trainer.resting_s if trainer is not None and node.phase is Phase.TRAINING else 0.0
    health.hold("resting", rest_s >= RESTING_S, rest_s=rest_s)
    spent = trainer.privacy if trainer is not None else PrivacySpent()
    steps = trainer.progress.planned_steps if trainer is not None else None
    drowns = spent.policy.clips_records and signal.drowns(spent.noise_norm, steps)
    health.hold("noise-drowns-signal", drowns, norm=spent.noise_norm)


def _certificate(node: Node, now: float) -> None:
    health, certificate = node.health, node.certificate
    ends_s = certificate.not_after_unix_s
    lifetime_s = ends_s - certificate.not_before_unix_s
    soon_s = ends_s - min(max(RENEWAL_S, RENEWAL_SHARE * lifetime_s), lifetime_s / 2)
    left, ends = duration(max(0.0, ends_s - now)), time.strftime(_DATE, time.gmtime(ends_s))
    health.hold("certificate-expiring", soon_s <= now < ends_s, left=left, ends=ends)
    health.hold("certificate-expired", now >= ends_s, ends=ends)
    if now >= ends_s:
        health.began("certificate-expired", ends_s)


def who_is_there(member: Member) -> str:
    """Describe the live members: how many count for `training.min_peers`, and their phases."""
    others, present = member.view.others(), member.view.present()
    phases = Counter(record.phase for record in others.values())
    each = ", ".join(f"{count} {phase}" for phase, count in sorted(phases.items()))
    return f"{len(present)} of {len(others)} live members are there" + (
        f" ({each})" if each else ""
    )


def _came_too_late(node: Node) -> bool:
    """Whether the run ended before any of this node's text was used."""
    trainer = node.running()
    if not node.phase.traits.ended or trainer is None:
        return False
    return trainer.progress.tokens == 0 and not trainer.privacy.steps_charged


def _trainer(node: Node, now: float) -> None:
    health, record, trainer = node.health, node.record, node.running()
    why = node.member.supervisor.down_reason if node.member else ""
    health.hold("trainer-down", bool(why), why=why)
    step = record.known.progress.step if record.known else 0
    again = record.died_at_step is not None and trainer is not None
    health.hold("steps-lost", again, at=record.died_at_step, step=step)

    at_work = node.phase is Phase.TRAINING and trainer is not None
    resting = trainer is not None and trainer.resting_s > 0
    patience_s, since_s = FIRST_STEP_S, node.life.since_s
    if record.steps.last_step_s is not None:
        patience_s = max(LEAST_STEP_S, SLOW_STEPS * (record.steps.step_s or 0.0))
        since_s = max(since_s, record.steps.last_step_s)
    still = at_work and not resting and now - since_s > patience_s
    health.hold("no-step", still, silent_s=now - since_s)

    every_s = node.config.checkpoint.every_s
    saved_s = max(record.saved_s or 0.0, node.life.since_s)
    late = at_work and now - saved_s > LATE_CHECKPOINTS * every_s + LEAST_STEP_S
    health.hold("checkpoint-late", late, late_s=now - saved_s, every_s=every_s)
    why = slower(trainer.privacy, trainer.facts) if trainer is not None else ""
    health.hold("steps-slower", bool(why), why=why)


def slower(spent: PrivacySpent, facts: Ready) -> str:
    """Why steps take longer than they could: what was refused at the start; empty = nothing."""
    if not spent.engine_refused:
        return facts.uncompiled
    return (
        f"private gradients are computed by {spent.engine}, since the test at the start refused "
        f"what is mostly faster: {spent.engine_refused}"
    )


def _losses(node: Node, now: float) -> None:
    health, trainer, known = node.health, node.running(), node.record.known
    progress = known.progress if known is not None else Progress()
    problem = node.record.evaluation_problem or progress.loss_problem
    health.hold("evaluation-failing", trainer is not None and bool(problem), why=problem)

    late_s = now - node.life.since_s
    if known is not None and progress.loss_measured_age_s is not None:
        late_s = min(late_s, progress.loss_measured_age_s + now - known.unix_s)
    at_work = node.phase is Phase.TRAINING and trainer is not None
    late = at_work and late_s > LATE_EVALUATION_S
    health.hold("evaluation-late", late, late=duration(late_s))

    lost = progress.adapter_misalignment or 0.0
    misaligned = trainer is not None and lost > MISALIGNED
    health.hold("adapters-misaligned", misaligned, lost=lost)


def _network(node: Node) -> None:
    swarm, health = node.swarm, node.health
    health.hold("sidecar-down", not swarm.sidecar_alive)
    silence = swarm.bootstrapping.silent_seeds
    health.hold("no-seed", bool(silence), why=silence)
    ahead_s, clocks = swarm.bootstrapping.clock_ahead_s, swarm.bootstrapping.clocks
    unheard = 0 < swarm.bootstrapping.unheard == clocks
    health.hold("not-called-back", unheard, asked=clocks)
    how = f"{abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'}"
    health.hold("clock-off", abs(ahead_s) > MAX_CLOCK_S, how=how, clocks=clocks)


def _is_exchanging(node: Node) -> bool:
    """Whether exchanges are to be expected. A node that has finished has few: it serves others."""
    return node.phase.traits.exchanges and node.phase is not Phase.FINISHED


def _exchanges(node: Node, member: Member, now: float) -> None:
    health, view, exchanging = node.health, member.view, _is_exchanging(node)
    partners, refusing = view.partners(), set(member.partners.refusing_our_ledger())
    behind = [peer for peer in partners if peer in refusing]
    health.hold("ledger-behind", bool(behind), refusing=len(behind), who=names(view, behind))
    health.hold("no-partner", exchanging and not partners)
    silent_s = now - max(member.partners.last_done_s or 0.0, node.life.since_s)
    rules, step_s = member.manifest.round, node.record.steps.step_s or 0.0
    every_s = pace.interval_s(rules, step_s) if node.phase is Phase.TRAINING else 0.0
    patience_s = max(MIN_STALE_S, STALE_ROUNDS * rules.slot_s, STALE_EXCHANGES * every_s)
    silent = exchanging and bool(partners) and silent_s > patience_s
    health.hold("no-exchange", silent, silent_s=silent_s)
    if not exchanging:
        health.clear("exchange-failed")


def _members(node: Node, member: Member, now: float) -> None:
    health, view = node.health, member.view
    view.missed.update(view.others_listed(), now)
    lost = view.missed.lost(now)
    longest_first = sorted(lost, key=lost.__getitem__)
    who = names(view, longest_first, {p: f"for {duration(now - s)}" for p, s in lost.items()})
    missing = _is_exchanging(node) and bool(lost)
    health.hold("partners-lost", missing, lost=len(lost), known=view.missed.known, who=who)

    training = sorted(view.still_training())
    waiting = node.phase in {Phase.CLOSING, Phase.BUDGET_SPENT} and bool(training)
    others = view.others()
    phases = {peer: f"still {others[peer].phase}" for peer in training}
    waited_s = duration(now - node.life.since_s)
    who = names(view, training, phases)
    health.hold("waiting-for-the-end", waiting, waited=waited_s, who=who)


def names(
    view: SwarmView, peers: Sequence[PeerId], more: Mapping[PeerId, str] | None = None
) -> str:
    """Name the first `NAMED` members, and count the others.

    Args:
        view: knows their names.
        peers: the members.
        more: remarks on some of them, in parentheses after the name.
    """
    remarks = more or {}
    each = [
        view.name_of(peer) + (f" ({remarks[peer]})" if peer in remarks else "")
        for peer in peers[:NAMED]
    ]
    left = f" and {len(peers) - NAMED} more" if len(peers) > NAMED else ""
    return ", ".join(each) + left
