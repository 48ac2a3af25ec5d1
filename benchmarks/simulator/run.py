"""One simulated training run, from what it is to its figures."""

from __future__ import annotations

import time
from typing import Any

import torch

from benchmarks.simulator import exports, model
from benchmarks.simulator.corpora import HELD_OUT_WINDOWS, Corpus, held_out
from benchmarks.simulator.exchange import Exchange
from benchmarks.simulator.links import Links
from benchmarks.simulator.peers import Peers
from benchmarks.simulator.spec import Run
from xpeer.training.schedule import Counters, learning_rate

CURVE_POINTS = 8
QUICK_WINDOWS = 32
"""Of each kind: for curves and exports, which need many evaluations."""
EXPORTED_AT = (2, 4, 6)
"""Points of the curve at which exports are measured."""
PUBLIC_WINDOWS = 8
"""Of each kind: the public text that `dynamic` measures by."""
FLOAT_BYTES = 4


def simulate(run: Run, corpora: tuple[Corpus, ...]) -> dict[str, Any]:
    """Train, and measure: losses in nats per byte on everybody's held-out text."""
    return _Simulation(run, corpora).train()


class _Simulation:
    def __init__(self, run: Run, corpora: tuple[Corpus, ...]) -> None:
        self._run, self._manifest = run, run.manifest()
        self._peers = Peers(corpora, self._manifest.optimiser, run.seed)
        self._links = Links(run.link, run.peers)
        self._tuning, self._report = held_out(corpora, model.CONTEXT + 1)
        self._exchange: Exchange | None = None
        if run.rule not in {"alone", "synchronous"}:
            self._exchange = Exchange(run, self._peers.theta, self._links, self._public())
            self._records = exports.Records(run.peers, self._exchange)
        slowness = run.slowness or (1,) * run.peers
        if run.barrier:
            slowness = (max(slowness),) * run.peers
        self._step_s = [run.step_s * slow for slow in slowness]
        self._end_s = run.steps * run.step_s
        self._curve: list[dict[str, float]] = []
        self._exports: dict[str, dict[str, list[float]]] = {}
        self._marks = [self._end_s * part / CURVE_POINTS for part in range(1, CURVE_POINTS + 1)]

    def train(self) -> dict[str, Any]:
        began = time.process_time()
        slots = self._loop()
        figures = self._measure()
        if self._exchange is not None and self._run.group == "pairs":
            self._exchange.consolidate(slots)
            figures["closed"] = model.evaluate(self._peers.theta, self._report).tolist()
        return figures | {"cpu_s": round(time.process_time() - began, 1)}

    def _loop(self) -> int:
        """Until the end of the clock; returns the number of slots."""
        run = self._run
        slot_s, slots = run.slot_steps * run.step_s, 1
        boundary_s = list(self._step_s)
        barrier_at, barrier_steps = run.slot_steps, 0
        while True:
            next_slot_s = slots * slot_s if self._exchange and not run.barrier else float("inf")
            now_s = min(*boundary_s, next_slot_s)
            if now_s > self._end_s + 1e-9:
                return slots
            active = [peer for peer, at_s in enumerate(boundary_s) if at_s <= now_s]
            if active:
                self._step(active, now_s)
                for peer in active:
                    boundary_s[peer] = now_s + self._step_s[peer]
            if run.barrier:
                barrier_steps += 1
                if barrier_steps % barrier_at == 0:
                    waited_s = self._exchange_and_wait(slots, now_s) - now_s
                    boundary_s = [at_s + waited_s for at_s in boundary_s]
                    slots += 1
            elif now_s >= next_slot_s and self._exchange:
                self._exchange.slot(slots, now_s)
                slots += 1
            for peer in active:
                self._merge(peer, now_s)
            self._mark(now_s)

    def _step(self, active: list[int], now_s: float) -> None:
        """The steps that end now; their rate is that of the moment at which they began."""
        rates = []
        for peer in active:
            began_s = now_s - self._step_s[peer]
            counters = Counters(step=self._peers.steps[peer], seconds=began_s)
            rates.append(learning_rate(counters, self._manifest))
        self._peers.step(active, rates, synchronous=self._run.rule == "synchronous")
        for peer in active:
            self._merge(peer, now_s)

    def _merge(self, peer: int, now_s: float) -> None:
        if self._exchange is not None:
            for arrival in self._exchange.merge(peer, now_s):
                if self._run.exports:
                    self._records.merged(arrival, self._peers.theta)

    def _exchange_and_wait(self, slot: int, now_s: float) -> float:
        """Barrier: nobody goes on before all have merged. Returns when."""
        if self._exchange is None:  # gradients were averaged within the step
            return self._links.all_reduce(FLOAT_BYTES * model.NUM_PARAMS, now_s)
        ready_s = self._exchange.slot(slot, now_s)
        for peer in range(self._run.peers):
            self._merge(peer, ready_s)
        return ready_s

    def _mark(self, now_s: float) -> None:
        if not self._marks or now_s < self._marks[0]:
            return
        part = CURVE_POINTS + 1 - len(self._marks)
        self._marks.pop(0)
        theta = self._peers.theta
        if self._run.rule == "alone":
            loss = float(self._quick(theta).mean())
        else:
            loss = float(self._quick(theta.mean(dim=0, keepdim=True)))
        self._curve.append(
            {
                "time_s": now_s,
                "steps": sum(self._peers.steps) / self._run.peers,
                "bytes": sum(self._links.bytes_sent) / self._run.peers,
                "loss": loss,
            }
        )
        if self._run.exports and self._exchange and part in EXPORTED_AT:
            measured = exports.measure(theta, self._records, self._exchange, self._quick)
            self._exports[f"{part}/{CURVE_POINTS}"] = measured

    def _public(self) -> torch.Tensor:
        return self._tuning[:: HELD_OUT_WINDOWS // PUBLIC_WINDOWS]

    def _quick(self, theta: torch.Tensor) -> torch.Tensor:
        return model.evaluate(theta, self._tuning[:: HELD_OUT_WINDOWS // QUICK_WINDOWS])

    def _measure(self) -> dict[str, Any]:
        theta = self._peers.theta
        mean = theta.mean(dim=0, keepdim=True)
        together = torch.cat((mean, theta)) if self._run.rule != "synchronous" else mean
        report = model.evaluate(together, self._report).tolist()
        tuning = model.evaluate(together if self._run.rule == "alone" else mean, self._tuning)
        distance = (theta - mean).pow(2).sum(dim=1).mean().sqrt() / mean.norm()
        per_step = self._links.bytes_sent[0] / self._run.steps / (FLOAT_BYTES * model.NUM_PARAMS)
        figures: dict[str, Any] = {
            "mean": report[0],
            "peers": report[1:] or report,
            "tuning": float(tuning[1:].mean() if len(tuning) > 1 else tuning[0]),
            "distance": float(distance),
            "sent_share": per_step,
            "steps": self._peers.steps,
            "curve": self._curve,
        }
        if self._exports:
            figures["exports"] = self._exports
        if self._exchange is not None:
            counts = self._exchange.counts
            figures["exchanges"] = {
                "merged": counts.merged,
                "missed": counts.missed,
                "busy": counts.busy,
                "clipped": counts.clipped,
            }
        return figures
