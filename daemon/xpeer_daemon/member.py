"""The parts of an admitted node. They are made and wired here; nothing runs before `serve`."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from xpeer.config import Home, NodeConfig
from xpeer.gossip.clock import Gossip
from xpeer.gossip.partners import Partners
from xpeer.identity import Identity, PeerId
from xpeer.manifest import Manifest
from xpeer.network import about, admission, agreement, giving, nudging
from xpeer.network.giving import Giver
from xpeer.network.membership.certificates import Membership
from xpeer.network.pieces import Shape
from xpeer.network.rates import Rates
from xpeer.network.shelf import Shelf
from xpeer.network.turns import Turns
from xpeer.network.uplink import Uplink
from xpeer.roster.roster import Roster
from xpeer.trainer.child import PROGRAM
from xpeer.trainer.client import TrainerProcess
from xpeer.trainer.setup import TrainerSetup
from xpeer_daemon.acquaintances import Acquaintances
from xpeer_daemon.closing import Closing
from xpeer_daemon.division import Shares
from xpeer_daemon.donors import Donors
from xpeer_daemon.joiner import Admitted, founds
from xpeer_daemon.missed import Missed
from xpeer_daemon.node import Node
from xpeer_daemon.offers import Offers
from xpeer_daemon.outcomes import Outcomes
from xpeer_daemon.parameters import Origin, Parameters, begins
from xpeer_daemon.presence import Presence
from xpeer_daemon.run_end import RunEnd
from xpeer_daemon.setups import Setups
from xpeer_daemon.store import Store
from xpeer_daemon.supervisor import Supervisor
from xpeer_daemon.swarm_view import SwarmView
from xpeer_daemon.takeover import Takeover
from xpeer_daemon.throughput import Throughput
from xpeer_daemon.trainer_events import TrainerEvents
from xpeer_daemon.windows import Windows

Spawn = Callable[[Coroutine[Any, Any, None]], object]
"""Runs a task beside all others, until the node ends."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of this run of the daemon.

    Attributes:
        paused: take no steps until `xpeer resume`.
        from_initial: a founder without parameters begins with the initial model at once. It does
            not wait for a member that holds the swarm's.
        accept_donor: PeerID of a member whose parameters a joiner takes over even if they
            are worse than the swarm's start, and nobody else offers such; None = of nobody.
        trainer: the module that the trainer process runs.
    """

    paused: bool = False
    from_initial: bool = False
    accept_donor: str | None = None
    trainer: str = PROGRAM


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """The parts of a node that it has before it is admitted."""

    home: Home
    config: NodeConfig
    options: Options
    identity: Identity
    membership: Membership
    store: Store
    node: Node
    windows: Windows


@dataclass(frozen=True, kw_only=True)
class Member:
    """The parts that an admitted node has besides.

    Attributes:
        turns: of joiners that this node gives parameters.
        renew: saves, stops and starts the trainer with a new setup.
    """

    manifest: Manifest
    party: agreement.Party
    view: SwarmView
    roster: Roster
    supervisor: Supervisor
    shares: Shares
    partners: Partners
    proposer: agreement.Proposer
    gossip: Gossip
    parameters: Parameters
    presence: Presence
    closing: Closing
    run_end: RunEnd
    rates: Rates
    uplink: Uplink
    turns: Turns
    renew: Callable[[], Coroutine[Any, Any, None]]


def build_member(candidate: Candidate, admitted: Admitted, spawn: Spawn) -> Member:
    """Make every part of a member, and give each the other parts that it needs.

    Args:
        candidate: the parts that there are already.
        admitted: manifest and keys that admission gave us.
        spawn: runs tasks that a part begins by itself.
    """
    node, store, manifest = candidate.node, candidate.store, admitted.manifest
    party = _party(candidate, admitted)
    roster = Roster(node.swarm, admitted.keyring, manifest.limits.max_members)
    training = _training(candidate, manifest, roster, spawn)
    view, supervisor, origin = training.view, training.supervisor, training.origin
    rates, closing = Rates(), _closing(manifest)
    donors = _donors(candidate, manifest, view, party, rates)
    partners = _partners(candidate, manifest, view, closing, rates)
    proposer = agreement.Proposer(party, node.swarm)
    uplink = Uplink(candidate.config.network.donate_mbit_s)
    return Member(
        manifest=manifest,
        party=party,
        view=view,
        roster=roster,
        supervisor=supervisor,
        shares=training.shares,
        partners=partners,
        proposer=proposer,
        gossip=_gossip(candidate, manifest, view, proposer, partners),
        parameters=Parameters(
            node, store, donors, supervisor, origin, founds=founds(candidate.home)
        ),
        presence=Presence(node, view, roster, partners, store, manifest.round.slot_s),
        closing=closing,
        run_end=RunEnd(node, view, supervisor, closing, store),
        rates=rates,
        uplink=uplink,
        turns=Turns(uplink.joiners(manifest.limits.max_transfers), rates),
        renew=training.renew,
    )


class _Training(NamedTuple):
    view: SwarmView
    supervisor: Supervisor
    shares: Shares
    origin: Origin
    renew: Callable[[], Coroutine[Any, Any, None]]


def _training(candidate: Candidate, manifest: Manifest, roster: Roster, spawn: Spawn) -> _Training:
    """Make the parts that start trainers. They need one another in a circle: a trainer's setup has
    the division of the corpus, the division needs all speeds, and our speed is our trainer's.
    """
    node, home, options = candidate.node, candidate.home, candidate.options

    def setup() -> TrainerSetup:
        return setups.make()  # made below, before any trainer is started

    async def renew() -> None:
        if supervisor.trainer is not None:
            await supervisor.renew(node.ends.patience_s(supervisor.trainer))

    events = TrainerEvents(node, candidate.windows, lambda: spawn(renew()))
    supervisor = Supervisor(
        setup, lambda made: TrainerProcess.start(made, events, program=options.trainer)
    )
    view = SwarmView(
        node.peer_id,
        candidate.config,
        node.life,
        supervisor,
        roster.members,
        _missed(candidate.store, node.clock()),
        Acquaintances(node.clock),
        _throughput(manifest),
    )
    shares = Shares(view.speeds, node.clock, by_speed=not manifest.privacy.policy.hides_batches)
    origin = Origin(founds(home) and (options.from_initial or begins(home, candidate.store)))
    setups = Setups(home, candidate.membership.swarm_id, node, shares, origin)
    return _Training(view, supervisor, shares, origin, renew)


def _party(candidate: Candidate, admitted: Admitted) -> agreement.Party:
    return agreement.Party(
        identity=candidate.identity,
        swarm_id=candidate.membership.swarm_id,
        keyring=admitted.keyring,
        manifest_hash=admitted.signed.genesis.manifest_hash,
        serial=candidate.node.certificate.serial,
        membership=candidate.membership,
    )


def _missed(store: Store, now_s: float) -> Missed:
    missed = Missed(store.partner_ended)
    missed.restore([(PeerId(p.peer_id), p.seen_unix_s) for p in store.known_peers()], now_s)
    return missed


def _throughput(manifest: Manifest) -> Throughput | None:
    if manifest.privacy.policy.hides_batches:
        return None
    rules = manifest.optimiser
    return Throughput(rules.batch_records * rules.sequence_tokens)


def _closing(manifest: Manifest) -> Closing:
    rules = manifest.round
    return Closing(rules.fragments, rules.closing_windows, least=rules.least_group)


def _partners(
    candidate: Candidate, manifest: Manifest, view: SwarmView, closing: Closing, rates: Rates
) -> Partners:
    node, store = candidate.node, candidate.store
    outcomes = Outcomes(candidate.membership.swarm_id, view, node.health, store, closing)
    partners = Partners(time.time, outcomes, manifest.round.slot_s, rates)
    partners.restore(
        [(peer.peer_id, peer.ledger_counter) for peer in store.known_peers()],
        store.went_back(),
        store.caught_up(),
    )
    return partners


def _donors(
    candidate: Candidate, manifest: Manifest, view: SwarmView, party: agreement.Party, rates: Rates
) -> Donors:
    """Make who asks members for parameters and who gathers them. They need one another."""
    node, store, folder = candidate.node, candidate.store, candidate.home.joining

    def ask(donor: PeerId) -> Awaitable[Giver]:
        return takeover.ask(donor)  # made below

    offers = Offers(view, store, manifest, ask)
    shape, avoid, spare = Shape(manifest.state_form), offers.avoid, offers.spare
    takeover = Takeover(party, node.swarm, shape, rates, folder, node.life, avoid, spare)
    accept = candidate.options.accept_donor
    return Donors(node, view, store, manifest, offers, takeover, accept)


def _gossip(
    candidate: Candidate,
    manifest: Manifest,
    view: SwarmView,
    proposer: agreement.Proposer,
    partners: Partners,
) -> Gossip:
    node = candidate.node
    return Gossip(
        me=node.peer_id,
        swarm_id=candidate.membership.swarm_id,
        manifest=manifest,
        host=view,
        proposer=proposer,
        nudge=partial(nudging.ask, node.swarm),
        clock=time.time,
        partners=partners,
    )


async def serve(member: Member, candidate: Candidate, admitted: Admitted) -> None:
    """Begin to answer all requests of other members."""
    swarm, party = candidate.node.swarm, member.party
    await member.roster.serve()
    await admission.serve(swarm, admitted.signed, admitted.keyring)
    await nudging.serve(swarm, member.gossip.nudged)
    await about.serve(swarm, candidate.node.about)
    await swarm.serve_links(agreement.PROTOCOL, agreement.answering(party, member.gossip), "member")
    await _serve_joiners(member, candidate)


async def _serve_joiners(member: Member, candidate: Candidate) -> None:
    """Give parameters to joiners."""
    swarm, manifest, source = candidate.node.swarm, member.manifest, member.view.donor
    shelf, shape = Shelf(manifest.round.window_steps), Shape(manifest.state_form)
    handler = giving.serving(member.party, source, shape, member.turns, shelf, member.uplink)
    await swarm.serve_links(giving.PROTOCOL, handler, "observer")
