"""What is the matter with a node, as far as it follows from what the node is: looked at anew each
time it is asked.

What only the job itself knows (a failed write) is noted by the job, in `Node.health`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xpeer_daemon.phases import ENDED, EXCHANGING

if TYPE_CHECKING:
    from xpeer.identity import PeerId
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
NAMED = 4
"""Members that a reason names; more are counted."""


def observe(node: Node) -> None:
    """Note in the node's health what can be seen of it now."""
    _life(node)
    _processes(node)
    _exchanges(node)


def _life(node: Node) -> None:
    health, state = node.health, node.state
    for known, code in _BEGINNINGS.items():
        note = node.joining_note or f"state is {known}"
        health.hold(code, state == known, note=note)
    health.hold("stopping", state == "stopping")
    health.hold("paused", state == "paused")
    trainer = node.running()
    rest_s = trainer.resting_s if trainer is not None and node.training() else 0.0
    health.hold("resting", rest_s >= RESTING_S, rest_s=rest_s)
    health.hold("budget-spent", node.budget_spent)
    health.hold("run-had-ended", not node.budget_spent and _came_too_late(node))


def _came_too_late(node: Node) -> bool:
    """Whether none of this node's text was used, and none will be."""
    trainer = node.running()
    if node.state not in ENDED or trainer is None:
        return False
    return trainer.progress.tokens == 0 and not trainer.privacy.steps_charged


def _processes(node: Node) -> None:
    supervisor, swarm, health = node.supervisor, node.swarm, node.health
    if supervisor is not None and supervisor.down_reason:
        health.set("trainer-down", why=supervisor.down_reason)
    else:
        health.clear("trainer-down")
    health.hold("sidecar-down", swarm is not None and not swarm.sidecar_alive)


def _exchanges(node: Node) -> None:
    health, partners = node.health, node.partners()
    refusing = set(node.book.refusing_our_ledger()) if node.book is not None else set()
    behind = [peer for peer in partners if peer in refusing]
    health.hold("ledger-behind", bool(behind), refusing=len(behind), who=names(behind))
    exchanging = node.state in EXCHANGING and node.state != "finished"
    health.hold("no-partner", exchanging and not partners)
    slot_s = node.manifest.round.slot_s if node.manifest else 1.0
    silent_s = node.clock() - (node.last_exchange_s or node.started_s)
    silent = exchanging and bool(partners) and silent_s > max(MIN_STALE_S, STALE_ROUNDS * slot_s)
    health.hold("no-exchange", silent, silent_s=silent_s)


def names(peers: list[str] | list[PeerId]) -> str:
    """Some members, by the ends of their ids."""
    more = f" and {len(peers) - NAMED} more" if len(peers) > NAMED else ""
    return ", ".join(peer[-8:] for peer in peers[:NAMED]) + more
