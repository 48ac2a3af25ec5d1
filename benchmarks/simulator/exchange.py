"""What simulated peers send one another and merge: the project's fragments, matching, codec, rules.

slot      snapshot of one fragment -> Q -> partners         at the slot's beginning
boundary  what arrived since the last one is merged         between two steps of a peer
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.simulator.links import Links
from benchmarks.simulator.model import NUM_PARAMS, evaluate
from benchmarks.simulator.spec import Run
from xpeer import weights
from xpeer.forms import Form
from xpeer.gossip import matching
from xpeer.identity import PeerId
from xpeer.mixing import rules
from xpeer.mixing.differences import difference
from xpeer.mixing.fragments import Fragments
from xpeer.mixing.rules.base import Correction
from xpeer.mixing.screen import Movement, NormLimit, Scale
from xpeer.wire import codec
from xpeer.wire.messages import Terms

COARSE = ("int4", "int2")
"""Rounded stochastically, as in the trainer."""


@dataclass(frozen=True)
class Arrival:
    """A correction that a peer may merge from `at_s` on."""

    at_s: float
    peer: int
    fragment: int
    correction: Correction
    theta: torch.Tensor
    """The peer's own at the snapshot, (n,) float32."""
    received: dict[int, torch.Tensor]
    """Q of the parameters of every partner, (n,) float32, minus Q of ours at the snapshot."""


@dataclass
class Counts:
    """Of exchanges, as seen by single peers."""

    merged: int = 0
    missed: int = 0
    """Failed on purpose."""
    busy: int = 0
    """The fragment was still in flight from an earlier slot."""
    clipped: int = 0


class Exchange:
    """All peers' exchanges.

    Args:
        run: what is simulated.
        theta: (N, P) float32, everybody's parameters; corrections are added in place.
        links: the clock.
        public: records by which `dynamic` measures quality, (r, CONTEXT + 1) int64.
    """

    def __init__(
        self, run: Run, theta: torch.Tensor, links: Links, public: torch.Tensor | None = None
    ) -> None:
        self.counts = Counts()
        self.arrivals: list[list[Arrival]] = [[] for _ in range(run.peers)]
        self._run, self._theta, self._links = run, theta, links
        self._names = [PeerId(f"peer{number}") for number in range(run.peers)]
        fragments = Fragments(NUM_PARAMS, run.fragments)
        self._indices = [_inside(fragments.indices(f)) for f in range(run.fragments)]
        self._rules = [rules.make(run.manifest().round) for _ in range(run.peers)]
        self._movements = [Movement(run.fragments) for _ in range(run.peers)]
        self._limits = [
            [NormLimit(of_differences=v != rule.parameters_at) for v in range(rule.vectors)]
            for rule in self._rules
        ]
        self._chance = random.Random(run.seed)
        self._weighting = run.manifest().round.policy.weighting
        self._speeds = [1 / slow for slow in run.slowness] or [1.0] * run.peers
        self._public = public
        for fragment in range(run.fragments):
            for peer, rule in enumerate(self._rules):
                rule.begin(fragment, self._read(peer, fragment))
                self._movements[peer].begin(fragment, self._read(peer, fragment))

    def indices(self, fragment: int) -> torch.Tensor:
        """Of a fragment's parameters, (n,); without what pads the last line."""
        return self._indices[fragment]

    def slot(self, slot: int, now_s: float) -> float:
        """Take everybody's snapshots and send them; returns when the last one arrives."""
        run = self._run
        fragment = matching.fragment_of(run.swarm_id, slot, run.fragments)
        last_s = now_s
        for group in self._groups(slot):
            if any(a.fragment == fragment for peer in group for a in self.arrivals[peer]):
                self.counts.busy += len(group)
            elif len(group) > 1:
                last_s = max(last_s, self._meet(group, fragment, now_s))
        return last_s

    def merge(self, peer: int, now_s: float) -> list[Arrival]:
        """At a peer's step boundary: add what arrived."""
        due = [a for a in self.arrivals[peer] if a.at_s <= now_s]
        for arrival in due:
            self._theta[peer].index_add_(
                0, self.indices(arrival.fragment), arrival.correction.values
            )
            self._rules[peer].merged(arrival.fragment, arrival.correction.state)
            values = arrival.correction.values
            self._movements[peer].merged(arrival.fragment, arrival.theta, values, 1.0)
            self.arrivals[peer].remove(arrival)
            self.counts.merged += 1
        return due

    def consolidate(self, slot: int) -> None:
        """The closing windows: 2 ceil(log2 N) times every fragment, averaged without training."""
        run = self._run
        for window in range(2 * math.ceil(math.log2(run.peers))):
            for group in self._groups(slot + window):
                for fragment in range(run.fragments):
                    sent = [self.coded(self._read(peer, fragment)) for peer in group]
                    mean = torch.stack(sent).mean(dim=0)
                    for peer, own in zip(group, sent, strict=True):
                        self._theta[peer].index_add_(0, self.indices(fragment), mean - own)

    def coded(self, values: torch.Tensor) -> torch.Tensor:
        """Q(values), (n,) float32."""
        return self._coded(values)[1]

    def _coded(self, values: torch.Tensor) -> tuple[bytes, torch.Tensor]:
        """The bytes that would travel, and Q(values), (n,) float32."""
        name = self._run.codec
        dither = self._chance.getrandbits(62) if name in COARSE else None
        payload = codec.encode(name, values, dither=dither)
        return payload, codec.decode(Form(name, values.numel()), payload)

    def _groups(self, slot: int) -> list[Sequence[int]]:
        if self._run.group == "all":
            return [range(self._run.peers)]
        pairs = matching.matching(self._run.swarm_id, slot, self._names)
        return [[self._names.index(a), self._names.index(b)] for a, b in pairs]

    def _meet(self, group: Sequence[int], fragment: int, now_s: float) -> float:
        run = self._run
        failed = self._failures(group)
        theta = {peer: self._read(peer, fragment) for peer in group}
        sent = {
            peer: self._coded(self._rules[peer].outgoing(fragment, theta[peer])) for peer in group
        }
        size = len(sent[group[0]][0])
        if run.group == "all":
            ready = dict.fromkeys(group, self._links.all_reduce(size, now_s))
        else:
            ready = {peer: self._links.send(peer, size, now_s) for peer in group}
        terms = self._terms(group)
        for peer in group:
            if peer in failed:
                self.counts.missed += 1
                continue
            at_s = max(ready[other] for other in group if other != peer)
            at_s += run.late_steps * run.step_s
            correction, received = self._correct(peer, fragment, theta[peer], sent, terms)
            arrival = Arrival(at_s, peer, fragment, correction, theta[peer], received)
            self.arrivals[peer].append(arrival)
        return max(ready.values())

    def _terms(self, group: Sequence[int]) -> dict[int, Terms]:
        """What everybody declares."""
        speeds = self._speeds if self._weighting == "tokens" else [1.0] * self._run.peers
        together = sum(speeds[peer] for peer in group)
        losses: list[float | None] = [None] * len(group)
        if self._weighting == "quality" and self._public is not None:
            losses = evaluate(self._theta[list(group)], self._public).tolist()
        return {
            peer: Terms(speeds[peer], together, epoch=0, ledger_counter=0, loss_public=loss)
            for peer, loss in zip(group, losses, strict=True)
        }

    def _correct(
        self,
        peer: int,
        fragment: int,
        theta: torch.Tensor,
        sent: dict[int, tuple[bytes, torch.Tensor]],
        terms: dict[int, Terms],
    ) -> tuple[Correction, dict[int, torch.Tensor]]:
        rule, limits = self._rules[peer], self._limits[peer]
        scale: Scale = self._movements[peer].scale(fragment, theta)
        own = sent[peer][1].view(rule.vectors, -1)
        received, shift = {}, torch.zeros_like(own)
        for other, (payload, _) in sent.items():
            if other == peer:
                continue
            bounds = [limit.of(self._names[other], scale) for limit in limits]
            form = Form(self._run.codec, own.numel())
            found = difference(form, own.view(-1), payload, bounds, rule.parameters_at)
            for limit, norm in zip(limits, found.norms, strict=True):
                if found.clipped:
                    limit.clipped(self._names[other])
                else:
                    limit.accepted(norm, self._names[other])
            self.counts.clipped += found.clipped
            weight = weights.of_pair(self._weighting, terms[peer], terms[other])
            shift.add_(found.values, alpha=weight)
            received[other] = found.values[rule.parameters_at]
        return rule.correct(fragment, theta, own, shift), received

    def _failures(self, group: Sequence[int]) -> set[int]:
        if self._chance.random() >= self._run.failing:
            return set()
        return set(group) if self._chance.random() < 0.5 else {self._chance.choice(group)}

    def _read(self, peer: int, fragment: int) -> torch.Tensor:
        return self._theta[peer].index_select(0, self.indices(fragment))


def _inside(indices: torch.Tensor) -> torch.Tensor:
    return indices[indices < NUM_PARAMS]
