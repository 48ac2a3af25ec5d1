"""What this node is doing, and what it says of itself: one state, its health, its status.

Knows no sockets: the service gives it the parts as they come up. The control API and gossip ask it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from xpeer.config import NodeConfig
from xpeer.control import End
from xpeer.errors import LedgerError, LocalError, PeerError, Reason, XpeerError
from xpeer.health import Health, HealthReason
from xpeer.identity import PeerId
from xpeer.manifest import Manifest
from xpeer.network.about import About
from xpeer.network.membership import Certificate
from xpeer.network.roster import MemberRecord, Roster
from xpeer.network.swarm import Swarm
from xpeer.status import PrivacySpent, Progress, State, Status
from xpeer.training import partition
from xpeer.training.handle import TrainerProcess
from xpeer_daemon import conditions, report
from xpeer_daemon.acquaintances import Acquaintances
from xpeer_daemon.ending import Ends
from xpeer_daemon.missed import Missed
from xpeer_daemon.partners import Partners
from xpeer_daemon.phases import ENDED, EXCHANGING
from xpeer_daemon.steps import Steps
from xpeer_daemon.store import Known
from xpeer_daemon.supervisor import Supervisor
from xpeer_daemon.throughput import Throughput

log = logging.getLogger("xpeer.node")

HOLDING = EXCHANGING | {"waiting", "paused"}
"""Phases in which a member holds the swarm's parameters and can give them to a joiner."""
PRESENT = HOLDING | {"fetching"}


class Node:
    """State of one peer; the host of gossip and the subject of the control API.

    Args:
        peer_id: ours.
        config: settings.
        clock: wall clock, seconds.
    """

    def __init__(
        self, peer_id: PeerId, config: NodeConfig, clock: Callable[[], float] = time.time
    ) -> None:
        self.peer_id = peer_id
        self.config = config
        self.clock = clock
        self.started_s = self.since_s = clock()
        self.health = Health(clock)
        self.state: State = "starting"
        self.paused = False
        """True from the operator's pause until resume."""
        self.resumes_as: State = "training"
        """The state that a pause interrupted."""
        self.budget_spent = False
        self.catching_up = False
        """Nothing is exchanged until it is known whether our parameters lie far behind."""
        self.leaving = False
        self.stopping = asyncio.Event()
        self.changed = asyncio.Event()
        """Set whenever the state changes: the roster record is renewed at once."""
        self.manifest: Manifest | None = None
        self.swarm_id = ""
        self.certificate: Certificate | None = None
        """Of this node's membership."""
        self.swarm: Swarm | None = None
        self.roster: Roster | None = None
        self.supervisor: Supervisor | None = None
        self.book: Partners | None = None
        self.throughput: Throughput | None = None
        self.last_exchange_s: float | None = None
        self.last_checkpoint_s: float | None = None
        self.joining_note = ""
        self.known: Known | None = None
        """What a trainer said last, of this run or the one before; None = nothing yet."""
        self.last_trainer: TrainerProcess | None = None
        """The one that runs, or ran last in this run."""
        self.steps = Steps()
        self.missed = Missed()
        self.acquaintances = Acquaintances(clock)
        self.died_at_step: int | None = None
        """Of a trainer that died; None once its successor is further."""
        self.ends: Ends | None = None
        self.evaluation_problem = ""
        """Why the last losses of the run can't be measured; empty: they can, or it is not the time
        yet."""

    # What the service tells it

    def enter(self, state: State) -> None:
        """Change the state, once, with a log line."""
        if state != self.state:
            log.info("state: %s -> %s", self.state, state)
            self.state = state
            self.since_s = self.clock()
            self.changed.set()

    def follow_trainer(
        self, trainer_state: str, progress: Progress, privacy: PrivacySpent | None = None
    ) -> None:
        """The trainer moved on, or changed its state: its end condition, or the budget's end."""
        self._remember(progress, privacy)
        if self.training() and trainer_state == "training":
            self.steps.observe(progress.step, self.clock())
        else:
            self.steps.interrupt()
        if self.throughput is not None:
            if self.training() and trainer_state == "training":
                blocked_s = progress.seconds_blocked
                self.throughput.observe(progress.step, self.clock(), blocked_s)
            else:
                self.throughput.interrupt()
        if self.state in ("finished", "stopping", "fetching", "waiting", "joining", "starting"):
            return
        if trainer_state == "training":
            self.budget_spent = False
            self.enter("training")
        elif trainer_state == "paused":
            self.enter("paused")
        elif trainer_state == "budget-spent":
            self.budget_spent = True
            self.enter("budget-spent")
        elif trainer_state == "closing":
            self.enter("closing")

    def crashed(self, cause: XpeerError) -> None:
        """The trainer said why it can't go on, now or at its start."""
        if isinstance(cause, LedgerError):
            self.health.failed("ledger-failing", cause.problem)

    def _remember(self, progress: Progress, privacy: PrivacySpent | None) -> None:
        before = self.known
        if before is not None and progress.tokens > before.progress.tokens:
            self.health.worked("ledger-failing")  # no step without a charge
        if before is not None and progress.step < before.progress.step:
            self.died_at_step = max(before.progress.step, self.died_at_step or 0)
        elif self.died_at_step is not None and progress.step >= self.died_at_step:
            self.died_at_step = None
        privacy = privacy or (before.privacy if before else None)
        self.known = Known(progress, privacy, self.clock())
        self.last_trainer = self.running() or self.last_trainer

    # Host of gossip

    @property
    def trainer(self) -> TrainerProcess | None:
        """The running trainer, if it may exchange: it holds the swarm's parameters."""
        return self.running() if self.state in EXCHANGING else None

    def running(self) -> TrainerProcess | None:
        """The trainer process, if there is one now."""
        return self.supervisor.trainer if self.supervisor else None

    def objection(self) -> str | None:
        """Why nothing is exchanged now."""
        if self.state == "paused":
            return Reason.PAUSED
        return None if self.trainer is not None and not self.catching_up else Reason.NOT_READY

    def training(self) -> bool:
        """Whether local steps are being taken."""
        return self.state == "training"

    def others(self) -> dict[PeerId, MemberRecord]:
        """Live members without ourselves and without those who left."""
        return {p: r for p, r in self.others_listed().items() if r.phase != "left"}

    def others_listed(self) -> dict[PeerId, MemberRecord]:
        """As `others`, with those who left."""
        if self.roster is None:
            return {}
        return {p: r for p, r in self.roster.members().items() if p != self.peer_id}

    def name_of(self, peer: PeerId) -> str:
        """What people call a member."""
        return self.acquaintances.name_of(peer)

    def about(self) -> About:
        """What we say of ourselves when we are asked."""
        trains = self.known is not None and self.state not in ("joining", "observing")
        step = self.known.progress.step if trains and self.known else None
        return About(self.config.network.name, step)

    def partners(self) -> list[PeerId]:
        """Live members that exchange."""
        return [
            peer
            for peer, record in self.others().items()
            if record.phase in EXCHANGING and record.role != "observer"
        ]

    def may_exchange(self, peer_id: PeerId) -> bool:
        """Whether what a member says of itself, if we have it, allows that it exchanges."""
        record = self.others_listed().get(peer_id)
        return record is None or (record.phase in EXCHANGING and record.role != "observer")

    def zones(self) -> dict[PeerId, str]:
        """As the members declare them, ourselves included."""
        zones = {peer: record.zone for peer, record in self.others().items()}
        return {**zones, self.peer_id: self.config.network.zone}

    def present(self) -> list[PeerId]:
        """Live members that train or are about to, without ourselves."""
        return [
            peer
            for peer, record in self.others().items()
            if record.phase in PRESENT and record.role != "observer"
        ]

    def active_phases(self) -> list[str]:
        """Phases of the other members that train, are about to, or have ended."""
        return [
            r.phase
            for r in self.others().values()
            if r.phase in conditions.ACTIVE and r.role != "observer"
        ]

    def donor(self) -> TrainerProcess | None:
        """The trainer, if a joiner may have its parameters."""
        return self.running() if self.state in HOLDING else None

    def settled(self, peer_id: PeerId) -> bool:
        """Whether an exchange between the partner and us would move nothing that matters.

        Two that have ended wait for those who still train, and then for the consolidation.
        """
        record = self.others().get(peer_id)
        if record is None or self.state not in ENDED or record.phase not in ENDED:
            return False
        if any(phase not in ENDED for phase in self.active_phases()):
            return True
        return self.state == record.phase == "finished"

    @property
    def speed(self) -> float:
        """As others are told, tokens/s: declared, else measured; 0 = unknown.

        Under privacy nothing is measured: how fast batches pass follows from private sizes.
        """
        declared = self.config.training.speed
        if declared or self.throughput is None:
            return declared
        return self.throughput.published

    def speeds(self) -> dict[str, float]:
        """As said by all that train or are about to, ourselves included."""
        others, present = self.others(), self.present()
        return {**{peer: others[peer].speed for peer in present}, self.peer_id: self.speed}

    def declared_rate(self, peer_id: PeerId) -> float:
        """Speed relative to the median member's, as published."""
        return partition.weights(self.speeds()).get(peer_id, 1.0)

    def quality(self) -> tuple[float | None, float]:
        """On the public text alone: losses on the shard are data."""
        trainer = self.running()
        if trainer is None:
            return None, 0.0
        return trainer.progress.loss_public, trainer.progress.loss_public_age

    # Subject of the control API

    async def pause(self) -> State:
        """Take no steps and no exchanges until `resume`. A node that still joins pauses once it
        would begin.

        Returns:
            The state now.

        Raises:
            LocalError: there is nothing to pause, or the trainer does not answer: nothing changed.
        """
        if self.state in ("observing", "stopping"):
            raise LocalError(
                f"there is nothing to pause: this node is {self.state}",
                "an observer takes no steps and no exchanges"
                if self.state == "observing"
                else "start it again with `xpeer start --paused`",
            )
        if self.state in EXCHANGING:
            interrupted = self.state
            if (trainer := self.running()) is not None:
                await trainer.run("pause")
            self.resumes_as = interrupted
            self.enter("paused")
        self.paused = True
        return self.state

    async def resume(self) -> State:
        """Undo `pause`: go on in the state that it interrupted.

        Returns:
            The state now.

        Raises:
            LocalError: the trainer does not answer: the node is still paused.
        """
        if self.state == "paused":
            trainer = self.running()
            if trainer is not None:
                await trainer.run("train")
            if trainer is not None and self.resumes_as in ("training", "mixing"):
                self.train_with(trainer)
            else:
                self.enter(self.resumes_as)
        self.paused = False
        return self.state

    async def instruct(self, trainer: TrainerProcess) -> None:
        """One that was restarted: the operator may have paused or resumed while it started."""
        if self.state == "paused" and self.paused:
            await trainer.run("pause")
        elif self.state == "paused":
            await self.resume()
        elif self.state in EXCHANGING - {"finished"}:
            await trainer.run("train")
            if self.state in ("training", "mixing"):
                self.train_with(trainer)

    def train_with(self, trainer: TrainerProcess) -> None:
        """It was told to train; without text it mixes."""
        self.enter("mixing" if trainer.text_problem else "training")
        self.looked_at_text(trainer.text_problem)

    def looked_at_text(self, problem: str) -> None:
        """The trainer tried to read the text once more; empty = it could."""
        if problem:
            self.health.failed("text-missing", problem)
        else:
            self.health.worked("text-missing")

    def request_stop(self, *, leave: bool) -> None:
        """Stop soon; with `leave` tell the others that we are gone."""
        self.leaving = self.leaving or leave
        self.stopping.set()

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
        self.saved()
        return path

    async def evaluate(self, trainer: TrainerProcess) -> None:
        """Measure the losses of the run's end.

        Raises:
            LocalError: it failed.
        """
        try:
            await trainer.evaluate()
        except LocalError as e:
            self.evaluation_problem = str(e)
            raise
        self.evaluation_problem = ""

    async def end(self) -> End:
        """How far this node's end is; answers after a moment, or when it is over."""
        if self.ends is None:
            return End(over=False)
        return await self.ends.told()

    def last_saved(self) -> tuple[int, float] | None:
        """Step and time of the newest checkpoint, if there is one."""
        return self.ends.last_saved() if self.ends is not None else None

    def saved(self) -> None:
        """A checkpoint is on the disk."""
        self.last_checkpoint_s = self.clock()
        self.health.worked("checkpoint-failing")

    def status(self) -> Status:
        """Everything an operator may want to know."""
        return report.status_of(self)

    def reasons(self) -> list[HealthReason]:
        """What is the matter, notes included; empty when all is well."""
        conditions.observe(self)
        return self.health.reasons()
