"""Honest peers are hardly ever clipped: the product's mixing, on peers that all descend to the same
point through noise, as AdamW does. Whole models: benchmarks/hostile.
"""

from __future__ import annotations

import math
import random

import pytest
import torch

from xpeer.forms import Form
from xpeer.mixing.differences import difference
from xpeer.mixing.screen import Movement, NormLimit, RateShare
from xpeer.wire import codec

N, FRAGMENTS, WARMUP, FINAL_RATE = 1280, 5, 30, 0.1


class Toy:
    """Peers of one swarm: every slot pairs them at random and exchanges one fragment."""

    def __init__(
        self,
        peers: int,
        *,
        speeds: tuple[int, ...],
        late: int,
        seed: int = 0,
        end: float = math.inf,
    ) -> None:
        self.chance, self.random = random.Random(seed), torch.Generator().manual_seed(seed)
        self.speeds, self.late, self.end = speeds, late, end
        self.start = 0.1 * torch.randn(FRAGMENTS, N, generator=self.random)
        self.target = self.start + torch.randn(FRAGMENTS, N, generator=self.random)
        self.theta: list[torch.Tensor] = []
        self.steps: list[int] = []
        self.movements: list[Movement] = []
        self.limits: list[NormLimit] = []
        self.merges = self.clipped = self.slot = 0
        self.training = True
        self._flying: list[tuple[int, int, int, torch.Tensor, torch.Tensor]] = []
        for _ in range(peers):
            self.join(self.start)

    def join(self, theta: torch.Tensor, *, behind: bool = False) -> None:
        movement = Movement(FRAGMENTS)
        for fragment in range(FRAGMENTS):
            movement.begin(fragment, theta[fragment])
        if behind:
            movement.lies_behind()
        self.theta.append(theta.clone())
        self.steps.append(0)
        self.movements.append(movement)
        self.limits.append(NormLimit())

    def step(self, peer: int) -> None:
        """The size of a step of AdamW: the rate, whatever the gradient's. It warms up and decays by
        steps, so that a fast peer is ahead.
        """
        self.steps[peer] += 1
        noise = torch.randn(FRAGMENTS, N, generator=self.random)
        gradient = self.theta[peer] - self.target + noise
        rate = self.rate(peer)
        self.theta[peer] -= 0.01 * rate.warmed_up * rate.decayed * gradient.clamp(-1, 1)

    def rate(self, peer: int) -> RateShare:
        """Of the full one."""
        done = min(1.0, self.steps[peer] / self.end)
        decayed = FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * done)) / 2
        return RateShare(min(1.0, max(1, self.steps[peer]) / WARMUP), decayed)

    def run(self, slots: int) -> None:
        for _ in range(slots):
            self.slot += 1
            for peer in range(len(self.theta)):
                due = self.slot % self.speeds[peer % len(self.speeds)] == 0
                if self.training and due and self.steps[peer] < self.end:
                    self.step(peer)
            for landed in [each for each in self._flying if each[0] <= self.slot]:
                _, peer, fragment, theta, z = landed
                self.theta[peer][fragment] += 0.5 * z
                self.movements[peer].merged(fragment, theta, z, 0.5)
                self._flying.remove(landed)
            order = list(range(len(self.theta)))
            self.chance.shuffle(order)
            for one, other in zip(order[::2], order[1::2], strict=False):
                fragment = self.slot % FRAGMENTS
                if not any(
                    each[1] in (one, other) and each[2] == fragment for each in self._flying
                ):
                    self.meet(one, other, fragment)

    def meet(self, one: int, other: int, fragment: int) -> None:
        sent = {p: codec.encode("int8", self.theta[p][fragment]) for p in (one, other)}
        for me, peer in ((one, other), (other, one)):
            theta = self.theta[me][fragment].clone()
            scale = self.movements[me].scale(fragment, theta, self.rate(me))
            limit = self.limits[me].of(str(peer), scale)
            found = difference(Form("int8", N), sent[me], sent[peer], [limit], 0)
            self.merges += 1
            self.clipped += found.clipped
            if found.clipped:
                self.limits[me].clipped(str(peer))
            else:
                self.limits[me].accepted(found.norms[0], str(peer))
            self._flying.append((self.slot + self.late, me, fragment, theta, found.values[0]))


@pytest.mark.parametrize("late", [0, 4])
@pytest.mark.parametrize("speeds", [(1,), (1, 1, 2, 4)], ids=["even", "speeds"])
def test_training_joining_and_closing_clip_one_merge_in_a_hundred_at_most(
    speeds: tuple[int, ...], late: int
) -> None:
    toy = Toy(4, speeds=speeds, late=late)
    toy.run(150)
    fetched = toy.theta[0].clone()
    toy.run(20)  # meanwhile it is on its way
    toy.join(fetched, behind=True)
    toy.run(80)
    assert toy.clipped <= 0.01 * toy.merges
    toy.training = False
    toy.run(60)
    assert toy.merges > 400
    assert toy.clipped <= 0.01 * toy.merges
    apart = max(float((theta - toy.theta[0]).norm()) for theta in toy.theta)
    assert apart < 0.05 * float(toy.theta[0].norm())


def test_fast_ones_at_their_end_do_not_clip_slow_ones() -> None:
    """Whose rate has not decayed so far yet, and who move more than they do."""
    for seed in range(4, 7):
        toy = Toy(4, speeds=(1, 1, 2, 4), late=0, seed=seed, end=150)
        toy.run(100)
        warming_up = toy.clipped
        toy.run(500)
        assert toy.steps == [150] * 4
        assert toy.clipped == warming_up


def test_a_node_that_comes_back_far_behind_is_brought_along_in_the_end() -> None:
    toy = Toy(4, speeds=(1,), late=0)
    toy.run(20)
    old = toy.theta[0].clone()
    toy.run(150)
    toy.theta[0] = old.clone()
    toy.movements[0] = Movement(FRAGMENTS)
    for fragment in range(FRAGMENTS):
        toy.movements[0].begin(fragment, old[fragment])
    toy.movements[0].lies_behind()
    toy.run(150)
    apart = float((toy.theta[0] - toy.theta[1]).norm())
    assert apart < 0.2 * float((old - toy.theta[1]).norm())
