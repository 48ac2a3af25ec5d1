"""N peers: their parameters, AdamW moments and samples, stepped in one batch.

Each peer draws its records from its own corpus with its own generator, which depends on the seed
and the peer alone: runs of one seed see the same records in the same order, whatever the method.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from benchmarks.simulator import model
from benchmarks.simulator.corpora import Corpus
from xpeer.manifest import Optimiser

EPSILON: Final = 1e-8
"""Of AdamW, as in torch.optim."""
_PEER_SEEDS: Final = 1_000


class Peers:
    """State of the training of all peers.

    Attributes:
        theta: (N, P) float32, everybody's parameters.
        steps: optimiser steps that each peer took.
    """

    def __init__(self, corpora: Sequence[Corpus], optimiser: Optimiser, seed: int) -> None:
        start = model.initial(torch.Generator().manual_seed(seed))
        self.theta = start.repeat(len(corpora), 1)
        self.steps = [0] * len(corpora)
        self._first = torch.zeros_like(self.theta)
        self._second = torch.zeros_like(self.theta)
        self._optimiser = optimiser
        self._texts = [corpus.train for corpus in corpora]
        self._generators = [
            torch.Generator().manual_seed(_PEER_SEEDS * (seed + 1) + peer)
            for peer in range(len(corpora))
        ]

    def __len__(self) -> int:
        return len(self.steps)

    def step(
        self, active: Sequence[int], rates: Sequence[float], *, synchronous: bool = False
    ) -> torch.Tensor:
        """One optimiser step of some peers.

        Args:
            active: their numbers, ascending.
            rates: learning rate of each of them.
            synchronous: all apply the average of the gradients (all peers must be active).

        Returns:
            Losses of their batches before the step, (len(active),) nats per byte.
        """
        records = torch.stack([self._records(peer) for peer in active])
        everybody = len(active) == len(self)
        rows = slice(None) if everybody else torch.tensor(list(active))
        theta = self.theta[rows]  # a view of all, or a copy of some
        gradients, losses = model.gradients(theta, records)
        if synchronous:
            gradients = gradients.mean(dim=0, keepdim=True).expand_as(gradients).contiguous()
        self._clip(gradients)
        first, second = self._first[rows], self._second[rows]
        options = self._optimiser
        first.lerp_(gradients, 1 - options.beta1)
        second.mul_(options.beta2).addcmul_(gradients, gradients, value=1 - options.beta2)
        for row, (peer, rate) in enumerate(zip(active, rates, strict=True)):
            self.steps[peer] += 1
            taken = self.steps[peer]
            theta[row].mul_(1 - rate * options.weight_decay)
            deviation = second[row].div(1 - options.beta2**taken).sqrt_().add_(EPSILON)
            theta[row].addcdiv_(first[row], deviation, value=-rate / (1 - options.beta1**taken))
        if not everybody:
            self.theta[rows], self._first[rows], self._second[rows] = theta, first, second
        return losses

    def _records(self, peer: int) -> torch.Tensor:
        text, batch = self._texts[peer], self._optimiser.batch_records
        starts = torch.randint(
            text.numel() - model.CONTEXT, (batch, 1), generator=self._generators[peer]
        )
        return text[starts + torch.arange(model.CONTEXT + 1)].long()

    def _clip(self, gradients: torch.Tensor) -> None:
        limit = self._optimiser.gradient_clip
        if limit > 0:
            norms = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
            gradients.mul_((limit / (norms + 1e-6)).clamp(max=1.0))
