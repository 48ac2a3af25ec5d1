"""The node as its operator commands it: the control API's `ControlledNode`."""

from __future__ import annotations

import asyncio
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
    """Carries out the operator's commands, and orders the trainer to do what a phase asks.

    Args:
        peer_id: ours.
        certificate: of our membership.
        config: settings.
        life: our phase.
        record: what our trainers said.
        swarm: the network.
        ends: the end of this node.
        clock: wall clock, seconds.

    Attributes:
        member: the parts of an admitted node; None until it is admitted.
        started_s: when the daemon started, by the clock.
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
        # Held while a phase and the trainer's order change: each change sees the one before it
        self._changing = asyncio.Lock()

    @property
    def health(self) -> Health:
        """The active conditions of this node."""
        return self.record.health

    @property
    def phase(self) -> Phase:
        """The phase of this node now."""
        return self.life.phase

    def running(self) -> TrainerProcess | None:
        """The trainer process; None while there is none."""
        return self.member.supervisor.trainer if self.member else None

    # The phase and its effects

    async def enter(self, phase: Phase) -> None:
        """Order the trainer to do what the phase asks, then enter the phase.

        Raises:
            LocalError: the trainer does not answer, or this phase can't follow; the phase is as it
                was.
        """
        async with self._changing:
            await self._enter(phase)

    async def _enter(self, phase: Phase) -> None:
        trainer = self.running()
        if trainer is not None and phase.traits.order != self.phase.traits.order:
            await trainer.run(phase.traits.order)
        self.life.enter(phase)
        if trainer is not None:
            self.life.follow(trainer.state)  # its run or budget may have ended meanwhile

    async def begin(self, trainer: TrainerProcess) -> None:
        """Train, or pause if the operator wants that. The trainer holds the swarm's parameters."""
        async with self._changing:
            if self.life.pause_wanted:
                await self._enter(Phase.PAUSED)
            else:
                await self._work(trainer)

    async def instruct(self, trainer: TrainerProcess) -> None:
        """Order a trainer that was restarted: the operator may have paused or resumed meanwhile."""
        async with self._changing:
            if not (self.phase.traits.exchanges or self.phase is Phase.PAUSED):
                return  # it gets its order once it holds parameters
            if self.phase in _WORKING:
                await self._work(trainer)
            await trainer.run(self.phase.traits.order)
            self.life.follow(trainer.state)

    async def _work(self, trainer: TrainerProcess) -> None:
        """Train, or mix if the text can't be read."""
        await self._enter(Phase.MIXING if trainer.facts.text_problem else Phase.TRAINING)
        self.record.looked_at_text(trainer.facts.text_problem)

    def follow_trainer(
        self, trainer: TrainerPhase, progress: Progress, privacy: PrivacySpent | None = None
    ) -> None:
        """Note that the trainer took a step, or came to the end of the run or of its budget."""
        self.record.remember(trainer, progress, privacy, self.running())
        at_work = self.phase is Phase.TRAINING and trainer == "training"
        self._observe(progress if at_work else None)
        self.life.follow(trainer)

    def _observe(self, progress: Progress | None) -> None:
        """Measure how fast steps are taken; None: no steps are taken now."""
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
        """Take no steps and no exchanges until `resume`. A node that still joins pauses when it
        would begin to train.

        Returns:
            The phase now.

        Raises:
            LocalError: there is nothing to pause, or the trainer does not answer; nothing changed.
        """
        async with self._changing:
            return await self._pause()

    async def _pause(self) -> Phase:
        if self.phase in {Phase.OBSERVING, Phase.STOPPING}:
            raise LocalError(
                f"there is nothing to pause: this node is {self.phase}",
                "an observer takes no steps and no exchanges"
                if self.phase is Phase.OBSERVING
                else "start it again with `xpeer start --paused`",
            )
        if self.phase.traits.exchanges:
            await self._enter(Phase.PAUSED)
        self.life.pause_wanted = True
        return self.phase

    async def resume(self) -> Phase:
        """Undo `pause`: go on in the phase that it interrupted.

        Returns:
            The phase now.

        Raises:
            LocalError: the trainer does not answer; the node is still paused.
        """
        async with self._changing:
            interrupted, trainer = self.life.interrupted, self.running()
            if interrupted in _WORKING and trainer is not None:
                await self._work(trainer)
            elif interrupted is not None:
                await self._enter(interrupted)
            self.life.pause_wanted = False
            return self.phase

    def request_stop(self, *, leave: bool, followed: bool = False) -> None:
        """Stop soon.

        Args:
            leave: first announce that this node is gone for good.
            followed: a client will ask how the end went, so the node stays until it has heard it.
        """
        if followed:
            self.ends.follow()
        self.life.request_stop(leave=leave)

    async def checkpoint(self) -> str:
        """Write a checkpoint now.

        Returns:
            Its path; "" if there is no trainer.

        Raises:
            LocalError: it can't be written, or the node has no parameters yet.
        """
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
        """How far this node has come with ending; returns after a moment, or when it is over."""
        return await self.ends.progress()

    # Answers

    def about(self) -> About:
        """Our name and step, for members that ask."""
        known = self.record.known
        trains = known is not None and self.phase not in {Phase.JOINING, Phase.OBSERVING}
        return About(self.config.network.name, known.progress.step if trains and known else None)

    def status(self) -> Status:
        """The answer of `xpeer status`."""
        return report.status_of(self)

    def reasons(self) -> list[HealthReason]:
        """Active conditions now, notes included; empty when all is well."""
        conditions.observe(self)
        return self.health.reasons()
