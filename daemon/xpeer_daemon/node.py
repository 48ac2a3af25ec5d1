"""The node as its operator commands it: the control API's `ControlledNode`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from xpeer.config import NodeConfig
from xpeer.control import End
from xpeer.errors import LocalError, PeerError
from xpeer.health import Health, HealthReason
from xpeer.identity import PeerId
from xpeer.network.about import About
from xpeer.phase import Phase, TrainerPhase
from xpeer.status import PrivacySpent, Progress, Status
from xpeer_daemon import conditions, report
from xpeer_daemon.ending import Ends
from xpeer_daemon.life import Life
from xpeer_daemon.training_record import TrainingRecord

if TYPE_CHECKING:
    from xpeer.network.membership.certificates import Certificate
    from xpeer.network.swarm import Swarm
    from xpeer.trainer.client import TrainerProcess
    from xpeer_daemon.member import Member

_WORKING = (Phase.TRAINING, Phase.MIXING)


class Node:
    """Commands, and what entering a phase does.

    Args:
        peer_id: ours.
        certificate: of our membership.
        config: settings.
        life: our phase.
        record: what our trainers said.
        swarm: the network.
        ends: how this node ends.
        clock: wall clock, seconds.

    Attributes:
        member: the parts of an admitted node; None until it is admitted.
    """

    def __init__(
        self,
        peer_id: PeerId,
        certificate: Certificate,
        config: NodeConfig,
        life: Life,
        record: TrainingRecord,
        swarm: Swarm,
        ends: Ends,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.peer_id = peer_id
        self.certificate = certificate
        self.config = config
        self.life = life
        self.record = record
        self.swarm = swarm
        self.ends = ends
        self.clock = clock
        self.started_s = clock()
        self.member: Member | None = None

    @property
    def health(self) -> Health:
        """What is the matter, as those who met it noted it."""
        return self.record.health

    @property
    def phase(self) -> Phase:
        """Where the node is in its life."""
        return self.life.phase

    def running(self) -> TrainerProcess | None:
        """The trainer process, if there is one now."""
        return self.member.supervisor.trainer if self.member else None

    # The phase and its effects

    async def enter(self, phase: Phase) -> None:
        """Order the trainer to do what the phase asks, then be in it.

        Raises:
            LocalError: the trainer does not answer, or the phase can't follow: nothing changed.
        """
        trainer = self.running()
        if trainer is not None and phase.traits.order != self.phase.traits.order:
            await trainer.run(phase.traits.order)
        self.life.enter(phase)
        if trainer is not None:
            self.life.follow(trainer.state)  # it may have come to an end meanwhile

    async def begin(self, trainer: TrainerProcess) -> None:
        """The trainer holds the swarm's parameters: train, or stay paused if that is wanted."""
        if self.life.pause_wanted:
            await self.enter(Phase.PAUSED)
        else:
            await self._work(trainer)

    async def instruct(self, trainer: TrainerProcess) -> None:
        """Tell one that was restarted what to do: the operator may have paused or resumed since."""
        if not (self.phase.traits.exchanges or self.phase is Phase.PAUSED):
            return  # it is told once it holds parameters
        if self.phase in _WORKING:
            await self._work(trainer)
        await trainer.run(self.phase.traits.order)
        self.life.follow(trainer.state)

    async def _work(self, trainer: TrainerProcess) -> None:
        """Train; without text, mix."""
        await self.enter(Phase.MIXING if trainer.text_problem else Phase.TRAINING)
        self.record.looked_at_text(trainer.text_problem)

    def follow_trainer(
        self, trainer: TrainerPhase, progress: Progress, privacy: PrivacySpent | None = None
    ) -> None:
        """The trainer's loop moved on: to another step, or to the end of the run or the budget."""
        self.record.remember(trainer, progress, privacy, self.running())
        at_work = self.phase is Phase.TRAINING and trainer == "training"
        self._observe(progress if at_work else None)
        self.life.follow(trainer)

    def _observe(self, progress: Progress | None) -> None:
        """Measure how fast steps are taken; None: none are."""
        steps = self.record.steps
        throughput = self.member.view.throughput if self.member else None
        if progress is None:
            steps.interrupt()
            if throughput is not None:
                throughput.interrupt()
            return
        steps.observe(progress.step, self.clock())
        if throughput is not None:
            throughput.observe(progress.step, self.clock(), progress.seconds_blocked)

    # Commands

    async def pause(self) -> Phase:
        """Take no steps and no exchanges until `resume`. A node that still joins pauses once it
        would begin.

        Returns:
            The phase now.

        Raises:
            LocalError: there is nothing to pause, or the trainer does not answer: nothing changed.
        """
        if self.phase in {Phase.OBSERVING, Phase.STOPPING}:
            raise LocalError(
                f"there is nothing to pause: this node is {self.phase}",
                "an observer takes no steps and no exchanges"
                if self.phase is Phase.OBSERVING
                else "start it again with `xpeer start --paused`",
            )
        if self.phase.traits.exchanges:
            await self.enter(Phase.PAUSED)
        self.life.pause_wanted = True
        return self.phase

    async def resume(self) -> Phase:
        """Undo `pause`: go on in the phase that it interrupted.

        Returns:
            The phase now.

        Raises:
            LocalError: the trainer does not answer: the node is still paused.
        """
        interrupted, trainer = self.life.interrupted, self.running()
        if interrupted in _WORKING and trainer is not None:
            await self._work(trainer)
        elif interrupted is not None:
            await self.enter(interrupted)
        self.life.pause_wanted = False
        return self.phase

    def request_stop(self, *, leave: bool) -> None:
        """Stop soon; with `leave` tell the others that we are gone."""
        self.life.request_stop(leave=leave)

    async def checkpoint(self) -> str:
        """Write one now; its path."""
        trainer = self.running()
        if trainer is None:
            return ""
        try:
            path = await trainer.checkpoint()
        except PeerError as e:
            raise LocalError(
                "there is nothing to save yet: this node has no parameters",
                "wait until it has fetched them (`xpeer status`)",
            ) from e
        except LocalError as e:
            self.health.failed("checkpoint-failing", e)
            raise
        self.record.saved()
        return path

    async def end(self) -> End:
        """How far this node's end is; answers after a moment, or when it is over."""
        return await self.ends.progress()

    # Answers

    def about(self) -> About:
        """What we say of ourselves when a member asks."""
        known = self.record.known
        trains = known is not None and self.phase not in {Phase.JOINING, Phase.OBSERVING}
        return About(self.config.network.name, known.progress.step if trains and known else None)

    def status(self) -> Status:
        """Everything an operator may want to know."""
        return report.status_of(self)

    def reasons(self) -> list[HealthReason]:
        """What is the matter, notes included; empty when all is well."""
        conditions.observe(self)
        return self.health.reasons()
