"""The end of the run: notices that it has come, and finishes this node."""

from __future__ import annotations

import asyncio
import logging

from xpeer.errors import ExitCode, LocalError
from xpeer.phase import Phase, traits_of
from xpeer.roster.roster import ANNOUNCE_EVERY_S
from xpeer_daemon.closing import Closing
from xpeer_daemon.node import Node
from xpeer_daemon.presence import ROSTER_EVERY_S
from xpeer_daemon.store import Store
from xpeer_daemon.supervisor import Supervisor
from xpeer_daemon.swarm_view import SwarmView

log = logging.getLogger("xpeer.daemon")

LOOK_S = 0.5
FINISH_AGAIN_S = 10.0
MIN_PATIENCE_S, PATIENCE = 3600.0, 4.0
"""At the end we wait for slower members: this multiple of our own training time, and an hour at
least."""


class RunEnd:
    """Watches for the end of one node's run.

    Args:
        node: enters its last phases, or is asked to stop.
        view: knows whether the others have ended.
        supervisor: of the trainer, which measures and saves at the end.
        closing: says whether all have mixed enough.
        store: remembers the end.

    Attributes:
        exit_code: exit code of the daemon, unless an error ends it.
    """

    def __init__(
        self,
        node: Node,
        view: SwarmView,
        supervisor: Supervisor,
        closing: Closing,
        store: Store,
    ) -> None:
        self.exit_code = ExitCode.OK
        self._node = node
        self._view = view
        self._supervisor = supervisor
        self._closing = closing
        self._store = store

    async def watch(self) -> None:
        """Look for the end every `LOOK_S`, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            await self.look()

    async def look(self) -> None:
        """Enter the next phase towards the end, if it is due."""
        node, life = self._node, self._node.life
        if life.phase is Phase.BUDGET_SPENT and node.config.daemon.exit_on_budget:
            self.exit_code = ExitCode.BUDGET_SPENT
            log.error("the privacy budget is spent, and daemon.exit_on_budget is set: exit 6")
            node.request_stop(leave=False)
        phases, in_phase_s = self._view.active_phases(), node.clock() - life.since_s
        if phases and in_phase_s <= 2 * ROSTER_EVERY_S:
            return  # cards are some seconds old: others may not know our phase yet, nor we theirs
        if in_phase_s > self._patience_s():
            phases = [phase for phase in phases if traits_of(phase).ended]
        if self._left_alone(phases):
            log.warning("all others have ended, and this node has no text: it ends, too")
            life.enter(Phase.CLOSING)
        elif life.phase in {Phase.CLOSING, Phase.BUDGET_SPENT} and self._closing.finished(phases):
            await self._finish()

    def _left_alone(self, phases: list[str]) -> bool:
        """Whether this node lacks text, and all others have ended: then it waits no longer."""
        trainer = self._supervisor.trainer
        idle = trainer is not None and bool(trainer.facts.text_problem)
        all_ended = bool(phases) and all(traits_of(phase).ended for phase in phases)
        return self._node.phase is Phase.MIXING and idle and all_ended

    def _patience_s(self) -> float:
        """How long we wait for others to end, so that one that trains for ever delays nobody."""
        trainer = self._supervisor.trainer
        trained_s = trainer.progress.seconds_training if trainer else 0.0
        return max(MIN_PATIENCE_S, PATIENCE * trained_s)

    async def _finish(self) -> None:
        node, trainer = self._node, self._supervisor.trainer
        if trainer is None:
            return  # it is being restarted: the next look comes soon
        phase = node.phase
        try:
            await node.record.evaluate(trainer)
            await node.checkpoint()
            if node.phase is not phase:
                return  # it was paused meanwhile
            await node.enter(Phase.FINISHED)
        except LocalError as e:
            log.warning("this node can't finish yet: %s", e)
            await asyncio.sleep(FINISH_AGAIN_S)
            return
        self._store.add_event("finished", f"step {trainer.progress.step}")
        if node.config.daemon.exit_when_finished:
            await asyncio.sleep(ANNOUNCE_EVERY_S)  # partners may need us for their last exchanges
            node.request_stop(leave=True)
