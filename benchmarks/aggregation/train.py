"""One run: 50 rounds' worth of steps, on simulated clouds, to its figures.

All methods take the same number of steps together (clouds times rounds times H). Those that wait
take H at each cloud in every round; those that do not, as many as each cloud has time for.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import torch

from benchmarks.aggregation.exchanges import AccountView, Asynchronous, ByData
from benchmarks.aggregation.setting import (
    CLOUDS,
    DATA,
    LINK,
    PART_BYTES,
    WINDOW_STEPS,
    Trial,
    cost_usd,
)  # fmt: skip
from benchmarks.simulator import corpora, model
from benchmarks.simulator.corpora import HELD_OUT_WINDOWS, Corpus
from benchmarks.simulator.links import Links
from benchmarks.simulator.peers import Peers
from xpeer.training.schedule import Counters, learning_rate

POINTS = 10
"""Of the curve."""
QUICK_WINDOWS, PUBLIC_WINDOWS = 32, 8
"""Of each kind: for the curve; what `dynamic` measures by."""
SCALE = LINK.model_params / model.NUM_PARAMS


def clouds() -> tuple[Corpus, ...]:
    """Each one's text: another kind, and another amount."""
    return tuple(
        dataclasses.replace(corpus, train=corpus.train[: parts * PART_BYTES])
        for corpus, parts in zip(corpora.collect(CLOUDS), DATA, strict=True)
    )


def train(trial: Trial) -> dict[str, Any]:
    """Losses in nats per byte of the clouds' average model, on everybody's held-out text."""
    if trial.method == "gradient":
        return _Gradient(trial).run()
    return _Waiting(trial).run() if trial.run().barrier else _Free(trial).run()


class _Training:
    """What all methods share: schedule, curve, figures."""

    def __init__(self, trial: Trial) -> None:
        self._trial, self._run = trial, trial.run()
        self._manifest = self._run.manifest()
        self._clouds = clouds()
        self._tuning, self._report = corpora.held_out(self._clouds, model.CONTEXT + 1)
        self._public = self._tuning[:: HELD_OUT_WINDOWS // PUBLIC_WINDOWS]
        self._links = Links(LINK, CLOUDS)
        self._step_s = [LINK.step_s * slow for slow in self._run.slowness]
        self._now_s = 0.0
        self._curve: list[dict[str, float]] = []

    def _rate(self, done: float, steps: int) -> float:
        """At a share of the run, after so many optimiser steps of the peer."""
        seconds = done * self._run.steps * self._run.step_s
        return learning_rate(Counters(step=steps, seconds=seconds), self._manifest)

    def _mark(self, theta: torch.Tensor, done: float) -> None:
        """Measure, if the share of the run that is done asks for it."""
        if done + 1e-9 < (len(self._curve) + 1) / POINTS:
            return
        mean = theta.mean(dim=0, keepdim=True)
        quick = self._tuning[:: HELD_OUT_WINDOWS // QUICK_WINDOWS]
        self._curve.append(
            {
                "round": done * self._trial.rounds,
                "time_s": self._now_s,
                "loss": float(model.evaluate(mean, quick)),
                "cost_usd": cost_usd(self._now_s, sum(self._links.bytes_sent) * SCALE),
            }
        )

    def _figures(self, theta: torch.Tensor, steps: list[int]) -> dict[str, Any]:
        mean = theta.mean(dim=0, keepdim=True)
        by_kind = [
            float(model.evaluate(mean, part))
            for part in self._report.view(CLOUDS, HELD_OUT_WINDOWS, -1)
        ]
        sent = [count * SCALE for count in self._links.bytes_sent]
        return {
            "tuning": float(model.evaluate(mean, self._tuning)),
            "loss": sum(by_kind) / CLOUDS,
            "loss_by_data": sum(map(operator.mul, DATA, by_kind)) / sum(DATA),
            "loss_by_kind": by_kind,
            "accuracy": float(model.accuracy(mean, self._report)),
            "gigabytes_per_cloud": sum(sent) / CLOUDS / 1e9,
            "hours": self._now_s / 3600,
            "cost_usd": cost_usd(self._now_s, sum(sent)),
            "steps": steps,
            "curve": self._curve,
        }


class _Waiting(_Training):
    """Everybody takes H steps and waits for the slowest, then for the exchange."""

    def run(self) -> dict[str, Any]:
        peers = Peers(self._clouds, self._manifest.optimiser, self._trial.seed)
        exchange = ByData(self._run, peers.theta, self._links, self._public)
        everybody = range(CLOUDS)
        for number in range(self._trial.rounds):
            for step in range(number * WINDOW_STEPS, (number + 1) * WINDOW_STEPS):
                rate = self._rate(step / self._trial.steps, step)
                peers.step(everybody, [rate] * CLOUDS)
            self._now_s += WINDOW_STEPS * max(self._step_s)
            self._now_s = exchange.slot(number, self._now_s)
            for peer in everybody:
                exchange.merge(peer, self._now_s)
            self._mark(peers.theta, (number + 1) / self._trial.rounds)
        return self._figures(peers.theta, peers.steps)


class _Gradient(_Training):
    """The same, with one optimiser step a round for all."""

    def run(self) -> dict[str, Any]:
        together = AccountView(self._clouds, self._manifest.optimiser, self._trial.seed)
        for number in range(self._trial.rounds):
            together.step(self._rate(number / self._trial.rounds, number), WINDOW_STEPS)
            self._now_s += WINDOW_STEPS * max(self._step_s)
            self._now_s = self._links.all_reduce(together.sent_bytes, self._now_s)
            self._mark(together.theta, (number + 1) / self._trial.rounds)
        return self._figures(together.theta, [self._trial.rounds] * CLOUDS)


class _Free(_Training):
    """Nobody waits: pairs at slots of the clock, or whoever is free."""

    def run(self) -> dict[str, Any]:
        peers = Peers(self._clouds, self._manifest.optimiser, self._trial.seed)
        kind = Asynchronous if self._trial.method == "asynchronous" else ByData
        exchange = kind(self._run, peers.theta, self._links, self._public)
        slot_s, slot = self._run.slot_steps * LINK.step_s, 1
        boundary_s = list(self._step_s)
        planned = CLOUDS * self._trial.steps
        while sum(peers.steps) < planned:
            slotted = not isinstance(exchange, Asynchronous)
            self._now_s = min(*boundary_s, slot * slot_s if slotted else float("inf"))
            active = [peer for peer, at_s in enumerate(boundary_s) if at_s <= self._now_s]
            done = sum(peers.steps) / planned
            if active:
                peers.step(active, [self._rate(done, peers.steps[peer]) for peer in active])
            for peer in active:
                boundary_s[peer] += self._step_s[peer]
                exchange.merge(peer, self._now_s)
            if isinstance(exchange, Asynchronous):
                for peer in active:
                    exchange.meet_if_due(peer, peers.steps, self._now_s)
            elif self._now_s >= slot * slot_s:
                exchange.slot(slot, self._now_s)
                slot += 1
            self._mark(peers.theta, min(1.0, sum(peers.steps) / planned))
        return self._figures(peers.theta, peers.steps)
