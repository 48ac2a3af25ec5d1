"""The daemon's life, start to end: join, take over the parameters, train and gossip, close, stop.

`_live` is the order of things on one screen.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from functools import partial
from typing import Any

from xpeer import founding, needs, sdnotify, signals
from xpeer.config import Home, NodeConfig
from xpeer.errors import (
    ExitCode,
    LocalError,
    Reason,
)
from xpeer.identity import Identity, PeerId
from xpeer.manifest import Manifest, SignedManifest
from xpeer.network import about, exchange, joining, matching, nudging, state
from xpeer.network.membership import Certificate, Membership
from xpeer.network.rates import Rates
from xpeer.network.roster import ANNOUNCE_EVERY_S, Roster
from xpeer.network.swarm import Swarm
from xpeer.round import Exchanged
from xpeer.training import checkpoint
from xpeer.training.child import PROGRAM
from xpeer.training.handle import (
    Crashed,
    Event,
    LookedAtText,
    Progressed,
    Saved,
    SaveFailed,
    TrainerProcess,
)
from xpeer.training.ipc import error_of
from xpeer.training.setup import TrainerSetup
from xpeer_daemon import logs, report, watch
from xpeer_daemon.api import ControlApi
from xpeer_daemon.donors import Donors
from xpeer_daemon.ending import SPARE_S, Ends, raise_first, within
from xpeer_daemon.gossip import Gossip
from xpeer_daemon.joiner import Joiner
from xpeer_daemon.node import Node
from xpeer_daemon.parameters import Parameters, begins
from xpeer_daemon.partners import ORDINARY, Partners
from xpeer_daemon.phases import ENDED, Closing, left_alone
from xpeer_daemon.presence import ROSTER_EVERY_S, Presence
from xpeer_daemon.shares import Shares
from xpeer_daemon.store import RoundRow, Store
from xpeer_daemon.supervisor import Supervisor
from xpeer_daemon.text import has_trained
from xpeer_daemon.throughput import Throughput
from xpeer_daemon.windows import Windows

log = logging.getLogger("xpeer.daemon")

TASKS_S, GOODBYE_S = 10.0, 3.0
"""At the end, for our own tasks, and for each thing that others are told."""
FINISH_AGAIN_S = 10.0
MIN_PATIENCE_S, PATIENCE = 3600.0, 4.0
"""At the end, slower peers get this much longer than we took ourselves, and an hour at least."""


class Service:
    """One run of the daemon.

    Args:
        home: locked by us.
        config: settings.
        paused: take no steps until `xpeer resume`.
        from_initial: a founder that lost its parameters waits for nobody who holds them.
        trainer: the module that the trainer process runs.
    """

    def __init__(
        self,
        home: Home,
        config: NodeConfig,
        *,
        paused: bool = False,
        from_initial: bool = False,
        trainer: str = PROGRAM,
    ) -> None:
        self._home = home
        self._trainer_program = trainer
        self._config = config
        self._identity = Identity.load(home.identity_key)
        credential = founding.load_credential(home)
        self._swarm_id = credential.claimed_swarm()
        self._certificate: Certificate = credential.verify(self._swarm_id, time.time())
        self._membership = Membership(self._swarm_id, credential)
        self._node = Node(self._identity.peer_id, config)
        self._node.swarm_id, self._node.certificate = self._swarm_id, self._certificate
        self._ends = self._node.ends = Ends(home, config)
        self._node.paused = paused
        self._from_initial = from_initial
        self._exit_code = ExitCode.OK
        self._tasks: asyncio.TaskGroup
        self._store: Store
        self._joiner: Joiner
        self._swarm: Swarm
        self._manifest: Manifest
        self._party: exchange.Party
        self._roster: Roster
        self._shares: Shares
        self._windows: Windows
        self._supervisor: Supervisor
        self._parameters: Parameters
        self._proposer: exchange.Proposer

    async def main(self) -> int:
        """Live until stopped, then end when all is saved.

        Raises:
            NotSavedError: steps since the last checkpoint are lost.
            LocalError: what ended the node; it goes before.
        """
        node, loop = self._node, asyncio.get_running_loop()
        signals.end_by(loop, lambda: node.request_stop(leave=False))
        async with contextlib.AsyncExitStack() as ending:
            self._store = Store.open(self._home.state_db, health=node.health)
            logs.watch(node.health)
            node.known = self._store.last_known()
            saved = [checkpoint.step_of(path) for path in checkpoint.paths(self._home.checkpoints)]
            log.info("this node %s", report.beginning(max(saved, default=None), node.known))
            self._windows = Windows(self._home.losses, node, self._store.keep_known)
            ending.callback(self._store.close)
            ending.callback(self._windows.keep)  # before it is closed: last in, first out
            self._joiner = Joiner(
                self._home, self._config, self._identity, self._membership, node, self._store
            )
            self._swarm = await self._joiner.connect()
            ending.push_async_callback(self._swarm.close)
            api = await ControlApi.start(self._home.socket(self._config), node)
            ending.push_async_callback(api.close)
            sdnotify.notify("READY=1\nSTATUS=joining")
            living = asyncio.create_task(self._live())
            stopping = asyncio.create_task(node.stopping.wait())
            try:
                await asyncio.wait({living, stopping}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                failed = living.done()
                await self._end(living, stopping)
            if failed:
                raise_first(living)
            if self._ends.lost is not None:
                raise self._ends.lost
        return int(self._exit_code)

    async def _live(self) -> None:
        async with asyncio.TaskGroup() as self._tasks:
            self._tasks.create_task(self._feed_watchdog())
            self._tasks.create_task(watch.keep_watching(self._node, self._home))
            self._manifest, swarm_key = await self._joiner.admission()
            await self._serve_members(swarm_key)
            self._tasks.create_task(self._presence.keep_announcing())
            self._tasks.create_task(self._presence.keep_refreshing())
            ask = partial(about.ask, self._swarm)
            self._tasks.create_task(self._node.acquaintances.keep_asking(ask, self._node.others))
            if self._certificate.role == "observer":
                self._node.enter("observing")
                return
            needs.require(needs.Needs.of(self._manifest), self._config.data, self._home)
            if self._manifest.shared_corpus is not None:
                await self._wait_for_peers()
            trainer = await self._start_trainer()
            trainer = await self._parameters.hold(trainer)
            await self._wait_for_peers()
            await self._begin(trainer)
            self._tasks.create_task(self._parameters.look_later())
            self._tasks.create_task(self._supervise())
            self._tasks.create_task(self._gossip.run())
            self._tasks.create_task(self._watch_for_the_end())
            if self._manifest.shared_corpus is not None:
                self._tasks.create_task(self._shares.keep(self._node.training, self._renew))

    # Members

    async def _serve_members(self, swarm_key: bytes) -> None:
        """Everything that other members may ask of us."""
        signed = SignedManifest.load(self._home.manifest)
        manifest, node = self._manifest, self._node
        self._party = exchange.Party(
            identity=self._identity,
            swarm_id=self._swarm_id,
            swarm_key=swarm_key,
            manifest_hash=signed.genesis.manifest_hash,
            serial=self._certificate.serial,
            membership=self._membership,
        )
        self._roster = node.roster = Roster(self._swarm, swarm_key, manifest.limits.max_members)
        await self._roster.serve()
        self._shares = Shares(node.speeds, node.clock, by_speed=manifest.privacy.mode == "off")
        self._supervisor = node.supervisor = Supervisor(
            self._setup,
            lambda setup: TrainerProcess.start(
                setup, self._on_trainer, program=self._trainer_program
            ),
        )
        rates = Rates()
        self._parameters = Parameters(
            node,
            self._store,
            Donors(node, self._store, self._party, self._swarm, manifest, rates),
            self._supervisor,
            founds=self._joiner.founds,
            begins=self._from_initial or begins(self._home, self._store),
        )
        self._proposer = exchange.Proposer(self._party, self._swarm)
        self._book = node.book = Partners(
            time.time,
            self._on_exchanged,
            self._on_skipped,
            self._on_went_back,
            lambda peer_id: self._store.add_event("ledger-caught-up", peer_id),
            slot_s=manifest.round.slot_s,
            rates=rates,
        )
        self._book.name_of = node.name_of
        self._gossip = Gossip(
            me=self._identity.peer_id,
            swarm_id=self._swarm_id,
            manifest=manifest,
            host=node,
            proposer=self._proposer,
            nudge=lambda peer_id: nudging.ask(self._swarm, peer_id),
            clock=time.time,
            partners=self._book,
        )
        node.missed.on_ended = self._store.partner_ended
        node.missed.restore(
            [(PeerId(p.peer_id), p.seen_unix_s) for p in self._store.known_peers()], node.clock()
        )
        self._presence = Presence(
            node, self._swarm, self._roster, self._book, self._store, self._certificate.role
        )
        self._book.restore(
            [(peer.peer_id, peer.ledger_counter) for peer in self._store.known_peers()],
            self._store.went_back(),
            self._store.caught_up(),
        )
        if manifest.privacy.mode == "off":
            rules = manifest.optimiser
            node.throughput = Throughput(rules.batch_records * rules.sequence_tokens)
        self._closing = Closing(
            manifest.round.fragments,
            manifest.round.closing_windows,
            least=manifest.round.group if manifest.round.masks else 2,
        )
        await joining.serve(self._swarm, signed, swarm_key)
        await nudging.serve(self._swarm, self._gossip.nudged)
        await about.serve(self._swarm, node.about)
        await self._swarm.serve_links(
            exchange.PROTOCOL,
            exchange.answering(self._party, self._gossip),
            "member",
        )
        await self._swarm.serve_links(
            state.PROTOCOL,
            state.serving(self._party, node.donor, manifest.limits.max_transfers, rates),
            "observer",
        )

    # The trainer

    def _setup(self) -> TrainerSetup:
        node = self._node
        # one that had ended takes the steps again that its checkpoint lacks
        trains = node.state in ("training", "mixing", "closing", "budget-spent")
        if node.throughput is not None:
            node.throughput.interrupt()
        return TrainerSetup(
            manifest_path=str(self._home.manifest),
            swarm_id=self._swarm_id,
            home=str(self._home.path),
            config=self._config,
            peer_id=node.peer_id,
            members=self._shares.take(),
            mode="train" if trains else "pause" if node.state == "paused" else "mix",
            has_trained=self._supervisor.last is not None or has_trained(self._home),
            initial=self._parameters.source,
        )

    async def _start_trainer(self) -> TrainerProcess:
        self._node.joining_note = "the trainer reads the shard and the model"
        trainer = await self._supervisor.first_start()
        self._node.joining_note = ""
        log.info(
            "trainer: %d parameters on %s, %s; %s",
            *(trainer.num_params, trainer.device, trainer.engine),
            "fresh" if trainer.resumed_step is None else f"resumed at step {trainer.resumed_step}",
        )
        return trainer

    async def _supervise(self) -> None:
        async def again(trainer: TrainerProcess) -> None:
            self._store.add_event("trainer-restarted", f"epoch {trainer.epoch}")
            self._node.looked_at_text(trainer.text_problem)
            self._closing.begin()  # what the one before had merged may be lost with it
            to_begin = await self._parameters.hold_again(trainer)
            if to_begin or (trainer.resumed_step is not None and self._node.state == "fetching"):
                await self._begin(trainer)
            else:
                await self._node.instruct(trainer)

        await self._supervisor.run(again)

    async def _renew(self) -> None:
        trainer = self._supervisor.trainer
        if trainer is not None:
            await self._supervisor.renew(self._ends.patience_s(trainer))

    async def _wait_for_peers(self) -> None:
        node, needed = self._node, self._config.training.min_peers
        node.enter("waiting")
        while len(node.present()) < needed:  # noqa: ASYNC110
            await asyncio.sleep(0.5)  # a roster has no event

    async def _begin(self, trainer: TrainerProcess) -> None:
        if self._node.paused:
            await trainer.run("pause")
            self._node.enter("paused")
            return
        self._node.train_with(trainer)
        await trainer.run("train")

    def _on_trainer(self, event: Event) -> None:
        if isinstance(event, Progressed):
            self._node.follow_trainer(event.state, event.progress, event.privacy)
            if event.privacy is not None:
                self._windows.look()
        elif isinstance(event, Saved):
            self._node.saved()
        elif isinstance(event, SaveFailed):
            self._node.health.failed("checkpoint-failing", event.problem)
        elif isinstance(event, LookedAtText):
            if event.problem:
                self._node.looked_at_text(event.problem)
            else:  # the condition lasts until a trainer has the text
                log.info("the text can be read again: the trainer is started anew")
                self._tasks.create_task(self._renew())
        elif isinstance(event, Crashed):
            log.error("trainer: %s", event.failure.problem)  # its trace is logged already
            self._node.crashed(error_of(event.failure))

    # Gossip

    def _on_exchanged(
        self, agreement: exchange.Agreement, result: Exchanged, took_s: float
    ) -> None:
        node = self._node
        node.last_exchange_s = node.clock()
        node.health.worked("exchange-failed")
        if node.state in ENDED and all(phase in ENDED for phase in node.active_phases()):
            self._closing.merged(agreement.fragment)
        self._store.add_round(
            RoundRow(
                slot=agreement.slot,
                partner=agreement.peer_id,
                fragment=agreement.fragment,
                distance=result.distance,
                seconds=took_s,
            )
        )

    def _on_skipped(self, peer_id: str, slot: int, reason: str, detail: str) -> None:
        if reason == Reason.REVEALED_BEFORE and self._node.state in ENDED:
            fragments = self._manifest.round.fragments
            self._closing.give_up(matching.fragment_of(self._swarm_id, slot, fragments))
        if reason not in ORDINARY:
            who = self._node.name_of(PeerId(peer_id)) if peer_id else "nobody"
            self._node.health.failed("exchange-failed", f"{who}: {reason} {detail}")
            self._store.add_round(
                RoundRow(slot=slot, partner=peer_id, reason=reason, detail=detail)
            )

    def _on_went_back(self, peer_id: PeerId, detail: str) -> None:
        self._store.add_event("ledger-went-back", f"{peer_id} {detail}")
        self._store.remember_peer(peer_id, [], self._book[peer_id].highest_counter)

    # The end

    async def _watch_for_the_end(self) -> None:
        node = self._node
        while True:
            await asyncio.sleep(0.5)
            if node.state == "budget-spent" and self._config.daemon.exit_on_budget:
                self._exit_code = ExitCode.BUDGET_SPENT
                log.error("the privacy budget is spent, and daemon.exit_on_budget is set: exit 6")
                node.request_stop(leave=False)
            phases = node.active_phases()
            # The others' records are a few seconds old: they may not have seen us end, nor we them.
            settled = not phases or node.clock() - node.since_s > 2 * ROSTER_EVERY_S
            if node.clock() - node.since_s > self._patience_s():
                phases = [phase for phase in phases if phase in ENDED]
            if settled and left_alone(node.state, self._supervisor.trainer, phases):
                log.warning("all others have ended, and this node has no text: it ends, too")
                node.enter("closing")
                continue
            if node.state in ("closing", "budget-spent") and settled:
                if self._closing.finished(phases):
                    await self._finish()

    def _patience_s(self) -> float:
        """How long we wait for others to end: a member that trains for ever holds up nobody."""
        trainer = self._supervisor.trainer
        trained_s = trainer.progress.seconds_training if trainer else 0.0
        return max(MIN_PATIENCE_S, PATIENCE * trained_s)

    async def _finish(self) -> None:
        node, trainer = self._node, self._supervisor.trainer
        if trainer is None:
            return  # it is being restarted; look again
        state = node.state
        try:
            await node.evaluate(trainer)
            await node.checkpoint()
        except LocalError as e:
            log.warning("this node can't finish yet: %s", e)
            await asyncio.sleep(FINISH_AGAIN_S)
            return
        if node.state != state:
            return  # it was paused meanwhile
        node.enter("finished")
        self._store.add_event("finished", f"step {trainer.progress.step}")
        if self._config.daemon.exit_when_finished:
            await asyncio.sleep(ANNOUNCE_EVERY_S)  # partners may still need us for theirs
            node.request_stop(leave=True)

    async def _end(self, *tasks: asyncio.Task[Any]) -> None:
        """Save, say goodbye, and leave nothing behind. Never raises."""
        sdnotify.notify("STOPPING=1")
        sdnotify.extend(TASKS_S + SPARE_S)
        self._node.enter("stopping")
        for task in tasks:
            task.cancel()
        _, stuck = await asyncio.wait(tasks, timeout=TASKS_S)
        if stuck:
            log.error("a task of the daemon did not end in %.0f s; the node ends without", TASKS_S)
        both = self._ends.save_all(self._node.supervisor), self._say_goodbye()
        for result in await asyncio.gather(*both, return_exceptions=True):
            if isinstance(result, BaseException):
                log.error("the end of the node failed", exc_info=result)
        self._ends.over()

    async def _say_goodbye(self) -> None:
        if self._node.roster is None:
            return
        await within(GOODBYE_S, self._proposer.close)
        if self._node.leaving:
            await within(GOODBYE_S, lambda: self._presence.announce("left"))

    async def _feed_watchdog(self) -> None:
        interval_s = sdnotify.watchdog_interval_s() or 10.0
        while True:
            sdnotify.notify(f"WATCHDOG=1\nSTATUS={report.in_short(self._node.status())}")
            await asyncio.sleep(interval_s)
