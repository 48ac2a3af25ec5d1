"""The daemon's life from start to end: join, become a member, train and gossip, close, stop.

`live` has the order of things on one screen. `member.build_member` makes the parts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

from xpeer import founding, needs, sdnotify, signals
from xpeer.config import Home, NodeConfig
from xpeer.health import Health
from xpeer.identity import Identity
from xpeer.network import about
from xpeer.network.membership.certificates import Membership
from xpeer.phase import Phase
from xpeer.trainer.client import TrainerProcess
from xpeer.training.checkpoint_files import paths, step_of
from xpeer_daemon import joiner, logs, report, watch
from xpeer_daemon.api import ControlApi
from xpeer_daemon.ending import SPARE_S, Ends, raise_first, within
from xpeer_daemon.life import Life
from xpeer_daemon.member import Candidate, Member, Options, build_member, serve
from xpeer_daemon.node import Node
from xpeer_daemon.store import Store
from xpeer_daemon.training_record import TrainingRecord
from xpeer_daemon.windows import Windows

log = logging.getLogger("xpeer.daemon")

TASKS_S, GOODBYE_S = 10.0, 3.0
"""Time at the end for our own tasks, and for each message to others."""
PEERS_S = 0.5
"""How often the roster is polled for the number of members: it has no event."""


async def run(home: Home, config: NodeConfig, options: Options) -> int:
    """Run the node until it is stopped, and return when all is saved.

    Args:
        home: locked by us.
        config: settings.
        options: of this run.

    Returns:
        The exit code.

    Raises:
        NotSavedError: steps since the last checkpoint are lost.
        LocalError: an error ended the node. It is raised even if steps are lost, too.
    """
    life = Life(time.time, pause_wanted=options.paused)
    signals.end_by(asyncio.get_running_loop(), lambda: life.request_stop(leave=False))
    async with contextlib.AsyncExitStack() as ending:
        candidate = await come_up(home, config, options, life, ending)
        living = asyncio.create_task(live(candidate))
        stopping = asyncio.create_task(life.stop_wanted.wait())
        try:
            await asyncio.wait({living, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            failed = living.done()
            await _end(candidate.node, living, stopping)
        if failed:
            raise_first(living)
        if candidate.node.ends.lost is not None:
            raise candidate.node.ends.lost
        member = candidate.node.member
    return int(member.run_end.exit_code) if member is not None else 0


async def come_up(
    home: Home,
    config: NodeConfig,
    options: Options,
    life: Life,
    ending: contextlib.AsyncExitStack,
) -> Candidate:
    """Make the parts that a node has before its admission, and start its network and its API.

    Args:
        home: locked by us.
        config: settings.
        options: of this run.
        life: of this node.
        ending: closes what is opened here, in the opposite order.
    """
    identity, credential = Identity.load(home.identity_key), founding.load_credential(home)
    membership = Membership(credential.claimed_swarm(), credential)
    certificate = credential.verify(membership.swarm_id, time.time())
    health = Health(time.time)
    logs.watch(health)
    store = Store.open(home.state_db, health=health)
    ending.callback(store.close)
    record = _record(home, store, health)
    swarm = await joiner.connect(home, config, identity, membership, store)
    ending.push_async_callback(swarm.close)
    node = Node(identity.peer_id, certificate, config, life, record, swarm, Ends(home, config))
    windows = Windows(home.losses, node, store.keep_known)
    ending.callback(windows.remember)
    api = await ControlApi.start(home.socket(config), node)
    ending.push_async_callback(api.close)
    sdnotify.notify("READY=1\nSTATUS=joining")
    return Candidate(
        home=home,
        config=config,
        options=options,
        identity=identity,
        membership=membership,
        store=store,
        node=node,
        windows=windows,
    )


def _record(home: Home, store: Store, health: Health) -> TrainingRecord:
    record = TrainingRecord(health, time.time, store.last_known())
    saved = [step_of(path) for path in paths(home.checkpoints)]
    log.info("this node %s", report.beginning(max(saved, default=None), record.known))
    return record


async def live(candidate: Candidate) -> None:
    """Join, become a member, get the parameters, then train and gossip; until cancelled."""
    node, home, config = candidate.node, candidate.home, candidate.config
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(_feed_watchdog(node))
        tasks.create_task(watch.keep_watching(node, home))
        way_in = joiner.Joiner(home, config, candidate.identity, node.swarm, node.life)
        admitted = await way_in.admission()
        member = build_member(candidate, admitted, tasks.create_task)
        node.member = member
        await serve(member, candidate, admitted)
        tasks.create_task(member.presence.keep_announcing())
        tasks.create_task(member.presence.keep_refreshing())
        ask = partial(about.ask, node.swarm)
        tasks.create_task(member.view.acquaintances.keep_asking(ask, member.view.others))
        if node.certificate.role == "observer":
            node.life.enter(Phase.OBSERVING)
            return
        needs.require(needs.Needs.of(member.manifest), config.data, home)
        if member.manifest.shared_corpus is not None:
            await _wait_for_peers(node, member)
        start = await _first_start(node, member)
        tasks.create_task(member.supervisor.run(partial(_go_on, candidate, member, start)))
        await _begin(node, member, start)
        tasks.create_task(member.parameters.catch_up_later())
        tasks.create_task(member.gossip.run())
        tasks.create_task(member.run_end.watch())
        if member.manifest.shared_corpus is not None:
            tasks.create_task(member.shares.keep_dividing(member.view.training, member.renew))


async def _wait_for_peers(node: Node, member: Member) -> None:
    node.life.enter(Phase.WAITING)
    while _lacks_peers(node, member):  # noqa: ASYNC110
        await asyncio.sleep(PEERS_S)


def _lacks_peers(node: Node, member: Member) -> bool:
    return len(member.view.present()) < node.config.training.min_peers


@dataclass
class _Start:
    """Which trainer this node begins with. It may die while the node waits for members.

    Attributes:
        holder: the last trainer that got the swarm's parameters; None after one could not begin.
        begun: True iff the node has begun. From then on `_go_on` gives a trainer its orders.
    """

    holder: TrainerProcess | None
    begun: bool = False


async def _begin(node: Node, member: Member, start: _Start) -> None:
    """Begin as soon as enough members are there, with a trainer that lives and has parameters."""
    node.life.enter(Phase.WAITING)
    while not start.begun:
        trainer = member.supervisor.trainer
        ready = trainer is start.holder and not _lacks_peers(node, member)
        if trainer is None or not ready:
            await asyncio.sleep(PEERS_S)
            continue
        start.begun = await member.supervisor.instruct(node.begin, trainer)
        if not start.begun and start.holder is trainer:
            start.holder = None


async def _first_start(node: Node, member: Member) -> _Start:
    """Start a trainer and give it the swarm's parameters.

    If it dies meanwhile, the supervisor starts it again, and `_go_on` gives it the parameters.
    """
    start = _Start(None)

    async def hold(trainer: TrainerProcess) -> None:
        start.holder = await member.parameters.hold(trainer)

    await member.supervisor.instruct(hold, await _start_trainer(node, member))
    return start


async def _start_trainer(node: Node, member: Member) -> TrainerProcess:
    node.life.note = "the trainer reads the shard and the model"
    trainer = await member.supervisor.first_start()
    node.life.note = ""
    log.info(
        "trainer: %d parameters on %s, %s; %s",
        *(trainer.num_params, trainer.facts.device, trainer.facts.engine),
        "fresh" if trainer.resumed_step is None else f"resumed at step {trainer.resumed_step}",
    )
    return trainer


async def _go_on(
    candidate: Candidate, member: Member, start: _Start, trainer: TrainerProcess
) -> None:
    """Go on with a trainer that was started again."""
    node = candidate.node
    candidate.store.add_event("trainer-restarted", f"epoch {trainer.epoch}")
    node.record.looked_at_text(trainer.facts.text_problem)
    member.closing.begin()  # the last trainer's merges may be lost with it
    to_begin = await member.parameters.hold_again(trainer)
    if not start.begun:
        if to_begin or trainer.resumed_step is not None:
            start.holder = trainer
            node.life.enter(Phase.WAITING)
    elif to_begin or (trainer.resumed_step is not None and node.phase is Phase.FETCHING):
        await node.begin(trainer)
    else:
        await node.instruct(trainer)


async def _end(node: Node, *tasks: asyncio.Task[Any]) -> None:
    """Cancel the node's tasks, save, and say goodbye to the others. Never raises."""
    sdnotify.notify("STOPPING=1")
    sdnotify.extend(TASKS_S + SPARE_S)
    node.life.enter(Phase.STOPPING)
    for task in tasks:
        task.cancel()
    _, stuck = await asyncio.wait(tasks, timeout=TASKS_S)
    if stuck:
        log.error("a task of the daemon did not end in %.0f s; the node ends without", TASKS_S)
    if (member := node.member) is not None:
        both = node.ends.save_all(member.supervisor), _say_goodbye(node, member)
        for result in await asyncio.gather(*both, return_exceptions=True):
            if isinstance(result, BaseException):
                log.error("the end of the node failed", exc_info=result)
    await node.ends.over()


async def _say_goodbye(node: Node, member: Member) -> None:
    await within(GOODBYE_S, member.proposer.close)
    if node.life.leaving:
        await within(GOODBYE_S, lambda: member.presence.announce("left"))


async def _feed_watchdog(node: Node) -> None:
    interval_s = sdnotify.watchdog_interval_s() or 10.0
    while True:
        sdnotify.notify(f"WATCHDOG=1\nSTATUS={report.in_short(node.status())}")
        await asyncio.sleep(interval_s)
