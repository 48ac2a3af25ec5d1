"""One corpus, four unequal clouds: equal shares, shares by declared and by measured speed.

The division is the product's (`xpeer.training.partition`), so is when it is made anew
(`xpeer_daemon.division`, `throughput`) and in which order records are seen (`privacy.passes`).
Clouds gossip as in `spread gossip`. Half-way through, one of the fast ones slows down to a third.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch

from benchmarks.aggregation.setting import CLOUDS, FRAGMENTS, LINK, SLOWNESS, WINDOW_STEPS, Trial
from benchmarks.simulator import corpora, model
from benchmarks.simulator.corpora import HELD_OUT_WINDOWS, Corpus
from benchmarks.simulator.exchange import Exchange
from benchmarks.simulator.links import Links
from benchmarks.simulator.peers import Peers
from benchmarks.simulator.spec import BATCH_RECORDS
from xpeer.manifest import Manifest
from xpeer.privacy.passes import Passes
from xpeer.training import partition
from xpeer.training.document import Document, document_of
from xpeer.training.schedule import Counters, learning_rate
from xpeer_daemon.division import STABLE_S, Shares
from xpeer_daemon.throughput import Throughput

Policy = Literal["equal", "weighted", "dynamic"]
POLICIES: Final[tuple[Policy, ...]] = ("equal", "weighted", "dynamic")
KIND_BYTES: Final = 400_000
"""Of each of the four kinds."""
DOCUMENT_BYTES: Final = (300, 60_000)
"""From short to long ones, evenly on a logarithmic scale."""
SLOWED: Final = 1
SLOWED_BY: Final = 3
RELOAD_S: Final = 30.0
"""A trainer that is given another share takes this long to save, restart and read it."""
RECORD: Final = model.CONTEXT + 1
STEP_TOKENS: Final = BATCH_RECORDS * RECORD
LEARN_FOR: Final = 1.25
"""Times as long as the best division would take at the speeds before the change."""


@dataclass(frozen=True)
class Text:
    """The corpus as documents and as records."""

    documents: list[Document]
    records: torch.Tensor
    """(n, RECORD) int64, no two alike."""
    rows: dict[str, list[int]]
    """Of each piece."""


def text_of(found: tuple[Corpus, ...], manifest: Manifest, kind_bytes: int) -> Text:
    """Documents of unequal length, and their pieces' records."""
    draw = random.Random(0)
    documents = {}
    for corpus in found:
        whole = bytes(corpus.train[:kind_bytes].tolist()).decode(errors="replace")
        start = 0
        while start < len(whole):
            low, high = DOCUMENT_BYTES
            length = int(low * (high / low) ** draw.random())
            document = document_of(whole[start : start + length], corpus.kind)
            documents[document.id] = document
            start += length
    known: dict[bytes, int] = {}
    rows: dict[str, list[int]] = {}
    for piece in partition.pieces(documents.values(), manifest):
        raw = piece.text.encode()
        cut = [raw[at : at + RECORD] for at in range(0, len(raw) - RECORD + 1, RECORD)]
        fresh = [record for record in dict.fromkeys(cut) if record not in known]
        rows[piece.id] = list(range(len(known), len(known) + len(fresh)))
        known |= dict(zip(fresh, rows[piece.id], strict=True))
    records = torch.tensor([list(record) for record in known], dtype=torch.int64)
    return Text(list(documents.values()), records, rows)


class Clouds(Peers):
    """Peers that train on their shares of the text instead of a corpus each."""

    def __init__(self, text: Text, manifest: Manifest, found: tuple[Corpus, ...]) -> None:
        super().__init__(found, manifest.optimiser, seed=0)
        self._text, self._manifest = text, manifest
        self._rows = [torch.empty(0, dtype=torch.int64)] * CLOUDS
        self._passes: list[Passes | None] = [None] * CLOUDS
        self.times_seen = torch.zeros(len(text.records), dtype=torch.int64)

    def divide(self, speeds: Mapping[str, float]) -> list[int]:
        """Everybody's share anew; returns how many records each has."""
        for peer, name in enumerate(speeds):
            mine, _ = partition.divide(self._text.documents, self._manifest, speeds, name)
            rows = [row for piece in mine for row in self._text.rows[piece.id]]
            before = self._passes[peer]
            self._rows[peer] = torch.tensor(rows)
            records = self._text.records[self._rows[peer]]
            self._passes[peer] = Passes(records, before.seen if before else None)
        return [len(rows) for rows in self._rows]

    def see(self, peer: int) -> torch.Tensor:
        """The next batch's rows, which count as trained on."""
        passes = self._passes[peer]
        if passes is None:
            raise RuntimeError("divide() comes first")
        rows = self._rows[peer][passes.take(BATCH_RECORDS)]
        self.times_seen[rows] += 1
        return rows

    def _records(self, peer: int) -> torch.Tensor:
        return self._text.records[self.see(peer)]


class Run:
    """One policy's run, to the moment at which every record was trained on.

    Args:
        policy: how shares are chosen.
        rate: of learning, at its peak; None: take no gradients.
        changing: whether a cloud slows down.
        kind_bytes: of each kind of text.
    """

    def __init__(
        self,
        policy: Policy,
        rate: float | None,
        *,
        changing: bool,
        kind_bytes: int = KIND_BYTES,
    ) -> None:
        found = corpora.collect(CLOUDS)
        trial = Trial("spread gossip", rate or 1.0)
        manifest = trial.run().manifest()
        self._text = text_of(found, manifest, kind_bytes)
        self._clouds = Clouds(self._text, manifest, found)
        self._learns = rate is not None
        together = sum(1 / slow for slow in SLOWNESS)
        steps = len(self._text.records) / BATCH_RECORDS / together
        self.ideal_s = steps * LINK.step_s
        self._manifest, self._trial = manifest, trial
        self._exchange = Exchange(trial.run(), self._clouds.theta, Links(LINK, CLOUDS))
        self._report = corpora.held_out(found, RECORD)[1][:: HELD_OUT_WINDOWS // 64]
        self._now_s = 0.0
        self._measured = [Throughput(STEP_TOKENS) for _ in SLOWNESS]
        self._policy, self._changing = policy, changing
        self._shares = Shares(self._speeds, lambda: self._now_s, by_speed=policy == "dynamic")
        self._divisions = [(0.0, self._clouds.divide(self._shares.divide()))]

    def figures(self) -> dict[str, Any]:
        """Time in seconds, losses in nats per byte."""
        learn_until_s = LEARN_FOR * self.ideal_s if self._learns else 0.0
        slot_s, slot, looks = WINDOW_STEPS / FRAGMENTS * LINK.step_s, 1, 1
        boundary_s = [self._step_s(peer) for peer in range(CLOUDS)]
        losses: list[dict[str, float]] = []
        seen_by_then = None
        while bool((self._clouds.times_seen == 0).any()):
            self._now_s = min(*boundary_s, slot * slot_s, looks * STABLE_S)
            active = [peer for peer, at_s in enumerate(boundary_s) if at_s <= self._now_s]
            learning = self._now_s <= learn_until_s
            if active:
                self._step(active, learning=learning, share=self._now_s / max(1.0, learn_until_s))
            for peer in active:
                self._measured[peer].observe(self._clouds.steps[peer], self._now_s, 0.0)
                boundary_s[peer] += self._step_s(peer)
            if self._now_s >= slot * slot_s:
                if learning:
                    self._exchange.slot(slot, self._now_s)
                    if slot % 40 == 0:
                        losses.append({"time_s": self._now_s, "loss": self._loss()})
                slot += 1
            if self._now_s >= looks * STABLE_S:
                looks += 1
                if self._shares.check_outdated():
                    self._divide_anew(boundary_s)
            if seen_by_then is None and self._now_s >= self.ideal_s:
                seen_by_then = self._seen()
        trained = int(self._clouds.times_seen.sum())
        return {
            "makespan_s": self._now_s,
            "seen_once_at_ideal_time": seen_by_then or self._seen(),
            "trained_again": trained / len(self._text.records) - 1,
            "divisions": self._divisions,
            "curve": losses,
        }

    def _step(self, active: list[int], *, learning: bool, share: float) -> None:
        if not learning:
            for peer in active:
                self._clouds.see(peer)
                self._clouds.steps[peer] += 1
            return
        seconds = min(share, 1.0) * self._trial.run().steps * LINK.step_s
        rates = [
            learning_rate(Counters(step=self._clouds.steps[p], seconds=seconds), self._manifest)
            for p in active
        ]
        self._clouds.step(active, rates)
        for peer in active:
            self._exchange.merge(peer, self._now_s)

    def _divide_anew(self, boundary_s: list[float]) -> None:
        self._divisions.append((self._now_s, self._clouds.divide(self._shares.divide())))
        for peer in range(CLOUDS):
            boundary_s[peer] += RELOAD_S
            self._measured[peer].interrupt()

    def _step_s(self, peer: int) -> float:
        slowed = self._changing and peer == SLOWED and self._now_s > self.ideal_s / 2
        return LINK.step_s * SLOWNESS[peer] * (SLOWED_BY if slowed else 1)

    def _speeds(self) -> dict[str, float]:
        names = [f"cloud{peer}" for peer in range(CLOUDS)]
        if self._policy == "equal":
            return dict.fromkeys(names, 1.0)
        if self._policy == "weighted":
            return {name: 1 / slow for name, slow in zip(names, SLOWNESS, strict=True)}
        return {n: measured.published for n, measured in zip(names, self._measured, strict=True)}

    def _seen(self) -> float:
        return float((self._clouds.times_seen > 0).float().mean())

    def _loss(self) -> float:
        return float(model.evaluate(self._clouds.theta.mean(dim=0, keepdim=True), self._report))
