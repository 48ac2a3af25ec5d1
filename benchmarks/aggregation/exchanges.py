"""Exchanges that the simulator does not know: by amount of data, without slots, of gradients."""

from __future__ import annotations

import random

import torch

from benchmarks.aggregation.setting import CODEC, DATA, WINDOW_STEPS
from benchmarks.simulator import model
from benchmarks.simulator.corpora import Corpus
from benchmarks.simulator.exchange import Exchange
from benchmarks.simulator.links import Links
from benchmarks.simulator.peers import EPSILON, Peers
from benchmarks.simulator.spec import Run
from xpeer.forms import Form
from xpeer.manifest import Optimiser
from xpeer.wire import codec


class ByData(Exchange):
    """Where the rule weights by tokens, clouds declare how much text they have (McMahan et al.
    2017), not how fast they are.
    """

    def __init__(self, run: Run, theta: torch.Tensor, links: Links, public: torch.Tensor) -> None:
        super().__init__(run, theta, links, public)
        self._speeds = [float(part) for part in DATA]


class Asynchronous(ByData):
    """Whoever took its steps since its last meeting meets anybody else who is free, but not the
    same twice running: as the daemon does for `round.rule = asynchronous`.
    """

    def __init__(self, run: Run, theta: torch.Tensor, links: Links, public: torch.Tensor) -> None:
        super().__init__(run, theta, links, public)
        self._met_at_step = [0] * run.peers
        self._last = [-1] * run.peers
        self._draw = random.Random(run.seed)

    def meet_if_due(self, peer: int, steps: list[int], now_s: float) -> None:
        """At a peer's step boundary, given everybody's steps so far."""
        if steps[peer] - self._met_at_step[peer] < WINDOW_STEPS or self.arrivals[peer]:
            return
        free = [
            other
            for other in range(len(steps))
            if other != peer and not self.arrivals[other] and peer != self._last[other]
        ]
        others = [other for other in free if other != self._last[peer]]
        if not others:
            self.counts.busy += 1
            return
        other = self._draw.choice(others)
        self._meet([peer, other], 0, now_s)
        for one, two in ((peer, other), (other, peer)):
            self._last[one], self._met_at_step[one] = two, steps[one]


class AccountView:
    """Gradient aggregation: everybody's mean gradient of H batches at the same parameters, rounded
    with error feedback, averaged, one AdamW step.

    Args:
        corpora: of the clouds.
        optimiser: of the manifest.
        seed: the same records as every other method's.
    """

    def __init__(self, corpora: tuple[Corpus, ...], optimiser: Optimiser, seed: int) -> None:
        self._peers = Peers(corpora, optimiser, seed)
        self._options = optimiser
        self._left = torch.zeros_like(self._peers.theta)
        self._first = torch.zeros(model.NUM_PARAMS)
        self._second = torch.zeros(model.NUM_PARAMS)
        self._steps = 0
        self.sent_bytes = 0

    @property
    def theta(self) -> torch.Tensor:
        """(N, P); all rows are equal."""
        return self._peers.theta

    def step(self, rate: float, batches: int) -> None:
        """One round's."""
        total = torch.zeros_like(self.theta)
        for _ in range(batches):
            records = torch.stack([self._peers._records(peer) for peer in range(len(self._peers))])
            total += model.gradients(self.theta, records)[0] / batches
        mean = torch.stack([self._coded(peer, row) for peer, row in enumerate(total)]).mean(dim=0)
        limit = self._options.gradient_clip
        mean *= min(1.0, limit / (float(mean.norm()) + 1e-6)) if limit else 1.0
        self._steps += 1
        self._first.lerp_(mean, 1 - self._options.beta1)
        self._second.lerp_(mean.square(), 1 - self._options.beta2)
        deviation = self._second.div(1 - self._options.beta2**self._steps).sqrt_().add_(EPSILON)
        scale = rate / (1 - self._options.beta1**self._steps)
        self.theta.sub_(scale * self._first / deviation)

    def _coded(self, peer: int, gradient: torch.Tensor) -> torch.Tensor:
        wanted = gradient + self._left[peer]
        payload = codec.encode(CODEC, wanted)
        self.sent_bytes = 2 * len(payload)  # parameters travel beside it
        sent = codec.decode(Form(CODEC, wanted.numel()), payload)
        self._left[peer] = wanted - sent
        return sent
