"""The demo's flow: public start, a swarm of three daemons, the same peers alone, a report."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from xpeer.cli.common import say
from xpeer.cli.demo import corpora, daemons, warmup
from xpeer.cli.demo.heldout import HeldOut, Snapshots, mean
from xpeer.cli.demo.report import PeerReport, Report, plot, table_of, words_of
from xpeer.cli.demo.view import View
from xpeer.config import Home
from xpeer.errors import LocalError, LocalTimeoutError
from xpeer.status import Status
from xpeer.training.losses import record_losses
from xpeer.training.model import from_folder

WINDOW_STEPS = 5
SEQUENCE_TOKENS = 128
BATCH_RECORDS = 48
SHARD_BYTES = 4_000_000
HELD_OUT_RECORDS = 96
SWARM_RATE = 6e-3
SPEEDS = {"python": 1.0, "headers": 1.0, "licences": 0.5}
PRIVATE_OVERHEAD = 1.3
"""A private step with its noise and exchanges takes this many times as long as a plain one."""
TIMEOUT_S = 1800.0
SAVING = {"XPEER_CHECKPOINT_EVERY_S": "2"}
"""The report's curves are read from the checkpoints."""
ALONE_AT_ONCE = 2
LOOPBACK = "/ip4/127.0.0.1/tcp/0"


@dataclass(frozen=True)
class Plan:
    """How long the demo's runs are."""

    steps: int
    """Private steps of a peer at full speed."""
    start_steps: int
    """Steps of the public start's training."""
    alone_rates: tuple[float, ...]
    """Learning rates for the lone runs; the best run of each peer counts. The swarm's rate is fixed
    beforehand. Empty = no lone runs."""


FULL = Plan(35, warmup.STEPS, (4e-3, 6e-3, 9e-3))
QUICK = Plan(15, 60, ())
"""One swarm, compared only with its start: two minutes."""


class Demo:
    """One run of the demo.

    Args:
        out: folder for all its files.
        seed: random seed of the public start.
        plan: FULL or QUICK.
    """

    def __init__(self, out: Path, seed: int, plan: Plan = FULL) -> None:
        self._seed = seed
        self._out = out
        self._plan = plan
        self._run = out / "run"
        warmup.clear(self._run)
        self._run.mkdir(parents=True)
        self._view = View()
        self._processes = daemons.Daemons(self._run / "logs")
        self._snapshots: dict[str, Snapshots] = {}

    def run(self) -> Report:
        """Run everything, from corpora to report. No process is left running, whatever happens."""
        with self._processes.running(), self._view.drawing():
            texts = self._write_texts()
            start = self._public_start(texts)
            held_out = HeldOut(self._held_out, start)
            by_kind = held_out.of_start()
            report = Report(
                seed=self._seed,
                quick=self._plan is QUICK,
                start_by_kind=by_kind,
                loss_start=mean(by_kind),
                checkpoint=str(self._run / "model"),
                report=str(self._run / "report.png"),
            )
            self._swarm(start, report, held_out)
            if self._plan.alone_rates:
                self._alone(start, report, held_out)
            plot(report, Path(report.report))
        self._view.print(table_of(report, corpora.LABELS))
        self._print_summary(report)
        return report

    # Text and start

    def _write_texts(self) -> list[str]:
        """Write the shards as files for the daemons; returns the public texts."""
        self._view.phase("collecting text from this environment", 4)
        self._held_out: dict[str, torch.Tensor] = {}
        public: list[str] = []
        for kind in (corpora.PUBLIC, *corpora.PRIVATE):
            corpus = corpora.collect(kind, SHARD_BYTES)
            if not corpus.texts or not corpus.held_out:
                raise LocalError(
                    f"this environment holds too little text of the kind {corpora.LABELS[kind]!r}",
                    "run the demo from the environment that `make install` makes",
                )
            folder = self._run / "text" / kind
            folder.mkdir(parents=True)
            for number, text in enumerate(corpus.texts):
                (folder / f"{number:05d}.txt").write_text(text, encoding="utf-8")
            if kind == corpora.PUBLIC:
                public = corpus.texts
                joined = "\n".join(corpus.held_out)
                (self._run / "text" / "public.txt").write_text(joined, encoding="utf-8")
            else:
                records = warmup.records_of(corpus.held_out, SEQUENCE_TOKENS)
                spread = max(1, len(records) // HELD_OUT_RECORDS)
                self._held_out[kind] = records[::spread][:HELD_OUT_RECORDS]
            self._view.advance()
        return public

    def _public_start(self, texts: list[str]) -> Path:
        steps = self._plan.start_steps
        self._view.phase("warming up the model on public text (cached)", steps)
        return warmup.warmed_up(
            texts, SEQUENCE_TOKENS, self._seed, self._out / "cache", self._view.to, steps
        )

    # The swarm

    def _swarm(self, start: Path, report: Report, held_out: HeldOut) -> None:
        self._view.phase("starting one bootstrap node and three daemons", 4)
        names = list(corpora.PRIVATE)
        homes = {name: Home(self._run / name) for name in names}
        founder, *joiners = names
        fields = {
            "end.steps": self._plan.steps,
            # Windows end by the clock as well, so that the slow peer ends with the others.
            "end.rounds": self._plan.steps // WINDOW_STEPS,
            "round.window_s": round(WINDOW_STEPS * step_seconds(start), 2),
            "optimiser.learning_rate": SWARM_RATE,
        }
        swarm_id = self._init(homes[founder], "demo", start, founder, fields)
        bootstrap_home = str(self._run / "bootstrap")
        self._processes.start(
            "bootstrap",
            ["bootstrap", "--home", bootstrap_home, "--swarm", swarm_id, "--listen", LOOPBACK,
             "--json"],
            {},
        )  # fmt: skip
        seed = daemons.first_address(self._processes, "bootstrap", 60)
        self._view.advance()
        self._start(founder, homes[founder], ["--bootstrap", seed])
        for name in joiners:
            peer_id = daemons.call(["id", "--home", str(homes[name].path)])
            token = daemons.call(
                ["invite", "create", "--home", str(homes[founder].path), "--for", peer_id,
                 "--seed", seed]
            )  # fmt: skip
            self._start(name, homes[name], ["--join", token, "--listen", LOOPBACK])
            self._view.advance()
        self._follow(homes)
        self._collect(homes, report, held_out)
        daemons.call(
            ["checkpoint", "export", "--home", str(homes[founder].path), "--hf",
             str(self._run / "model")]
        )  # fmt: skip

    def _init(
        self, home: Home, name: str, start: Path, corpus: str, fields: dict[str, float]
    ) -> str:
        fields = {
            **fields,
            "optimiser.batch_records": BATCH_RECORDS,
            "optimiser.sequence_tokens": SEQUENCE_TOKENS,
            "optimiser.warmup_steps": 5,
            "round.window_steps": WINDOW_STEPS,
            "round.slot_s": 0.5,
            "privacy.epsilon": 8.0,
        }
        changes = [part for key, value in fields.items() for part in ("--set", f"{key}={value}")]
        return daemons.call(
            ["init", "--home", str(home.path), "--swarm", name, "--model", str(start),
             "--tokenizer", "bytes",
             "--public-text", str(self._run / "text" / "public.txt"),
             "--shard", str(self._run / "text" / corpus), "--listen", LOOPBACK, *changes]
        )  # fmt: skip

    def _start(self, name: str, home: Home, arguments: list[str]) -> None:
        settings = {
            "XPEER_TRAINING_MIN_PEERS": str(len(SPEEDS) - 1),
            "XPEER_TRAINING_THREADS": "1",
            "XPEER_TRAINING_SPEED": str(SPEEDS[name]),
            "XPEER_TRAINING_THROTTLE": str(SPEEDS[name]),
            "XPEER_DATA_SHARD": str(self._run / "text" / name),
            **SAVING,
        }
        self._processes.start(name, ["start", "--home", str(home.path), *arguments], settings)

    def _follow(self, homes: dict[str, Home]) -> None:
        """Watch the daemons until all have finished."""
        total = self._plan.steps * len(homes)
        self._view.phase("training together", total)
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            seen = self._seen(homes)
            self._view.to(sum(status.progress.step for status in seen.values()), total)
            if len(seen) == len(homes) and all(s.state == "finished" for s in seen.values()):
                return
            self._wait(deadline)

    def _seen(self, homes: dict[str, Home]) -> dict[str, Status]:
        """Ask all daemons for their status and draw it; returns the answers that came."""
        self._processes.check_alive()
        answers = {name: daemons.status_of(home) for name, home in homes.items()}
        seen = {name: status for name, status in answers.items() if status is not None}
        for name in seen:
            self._snapshots_of(name, homes[name]).look()
        self._view.show(answers)
        return seen

    def _snapshots_of(self, name: str, home: Home) -> Snapshots:
        if name not in self._snapshots:
            self._snapshots[name] = Snapshots(home.checkpoints, WINDOW_STEPS)
        return self._snapshots[name]

    def _wait(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            raise LocalTimeoutError("the demo took too long", f"see {self._run / 'logs'}")
        time.sleep(0.5)

    def _collect(self, homes: dict[str, Home], report: Report, held_out: HeldOut) -> None:
        distances = []
        for name, home in homes.items():
            status = daemons.status_of(home)
            if status is None:
                raise LocalError(f"{name} does not answer", f"see {self._processes.log(name)}")
            report.peers.append(
                PeerReport(
                    corpus=name,
                    peer_id=status.peer_id,
                    speed=SPEEDS[name],
                    epsilon=status.privacy.epsilon_spent,
                    delta=status.privacy.delta,
                    steps=status.progress.step,
                    exchanges=status.exchanges_done,
                    one_sided=status.one_sided_merges,
                    bytes_sent=status.bytes_out,
                )
            )
            report.windows = max(report.windows, status.round)
            report.compression_ratio = status.compression_ratio
            distances.append(status.progress.consensus_distance)
        self._processes.end([*homes, "bootstrap"])
        self._view.phase("measuring on everybody's held-out text", len(report.peers))
        for peer in report.peers:
            snapshots = self._snapshots_of(peer.corpus, homes[peer.corpus])
            snapshots.look(last=True)
            peer.swarm_curve = snapshots.curve(report.loss_start, held_out)
            peer.swarm_by_kind = held_out.by_kind(snapshots.last())
            peer.loss_swarm = mean(peer.swarm_by_kind)
            self._view.advance()
        report.bytes_sent = sum(peer.bytes_sent for peer in report.peers)
        report.epsilon = max(peer.epsilon for peer in report.peers)
        report.delta = max(peer.delta for peer in report.peers)
        report.consensus_distance = max((d for d in distances if d is not None), default=None)

    # Alone

    def _alone(self, start: Path, report: Report, held_out: HeldOut) -> None:
        """Train every peer by itself, with the swarm's steps and budget, at several rates.

        The best run of each peer counts.
        """
        waiting = sorted(
            ((peer, rate) for peer in report.peers for rate in self._plan.alone_rates),
            key=lambda job: job[0].steps,  # `pop` takes the last: the longest run first
        )
        total, done = sum(peer.steps for peer, _ in waiting), 0
        best: dict[str, Snapshots] = {}
        running: dict[str, tuple[PeerReport, float]] = {}
        homes: dict[str, Home] = {}
        self._view.phase(f"each peer alone, to compare; {ALONE_AT_ONCE} at a time", total)
        deadline = time.monotonic() + TIMEOUT_S
        while waiting or running:
            while waiting and len(running) < ALONE_AT_ONCE:
                peer, rate = waiting.pop()
                name = f"alone-{peer.corpus}-{rate:g}"
                running[name] = (peer, rate)
                homes[name] = self._start_alone(name, start, peer, rate)
            seen = self._seen({name: homes[name] for name in running})
            self._view.to(done + sum(s.progress.step for s in seen.values()), total)
            for name in [name for name, status in seen.items() if status.state == "finished"]:
                peer, rate = running.pop(name)
                done += peer.steps
                self._processes.end([name])
                snapshots = self._snapshots.pop(name)
                snapshots.look(last=True)
                by_kind = held_out.by_kind(snapshots.last())
                if peer.loss_alone is None or mean(by_kind) < peer.loss_alone:
                    peer.loss_alone, peer.alone_learning_rate = mean(by_kind), rate
                    peer.alone_by_kind, best[peer.corpus] = by_kind, snapshots
            self._wait(deadline)
        for peer in report.peers:
            peer.alone_curve = best[peer.corpus].curve(report.loss_start, held_out)
        average = held_out.average([snapshots.last() for snapshots in best.values()])
        report.loss_alone_averaged = held_out.loss(average)

    def _start_alone(self, name: str, start: Path, peer: PeerReport, rate: float) -> Home:
        home = Home(self._run / name)
        fields = {"end.steps": peer.steps, "optimiser.learning_rate": rate}
        self._init(home, name, start, peer.corpus, fields)
        settings = {"XPEER_TRAINING_THREADS": "1", **SAVING}
        self._processes.start(name, ["start", "--home", str(home.path), "--bootstrap"], settings)
        return home

    # Report

    def _print_summary(self, report: Report) -> None:
        ratio = report.compression_ratio or 0.0
        for line in words_of(report):
            say(line)
        say(
            f"privacy: every peer's records at epsilon <= {report.epsilon:.2f}, "
            f"delta <= {report.delta:.1e}; a record is {SEQUENCE_TOKENS} bytes, not a whole file"
        )
        if self._plan.alone_rates:
            say(
                "         (of the swarm's run; the lone runs are a comparison, and on real text "
                "their epsilon would have to be paid on top)"
            )
        say(
            f"{report.windows} windows, {sum(p.exchanges for p in report.peers)} exchanges, "
            f"{report.bytes_sent / 1e6:.1f} MB sent in all, {ratio:.2f}x compressed, "
            f"consensus distance {report.consensus_distance or 0.0:.4f}"
        )
        say(f"plot {report.report}; model {report.checkpoint} (AutoModelForCausalLM loads it)")


def step_seconds(start: Path) -> float:
    """Estimate the seconds of a private step at full speed while all peers train here."""
    model = from_folder(start)
    records = torch.randint(0, 256, (BATCH_RECORDS // 6, SEQUENCE_TOKENS))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    began = time.perf_counter()
    for _ in range(6):
        losses, counts = record_losses(model, records)
        torch.autograd.backward(losses.sum() / counts.sum())
    took_s = time.perf_counter() - began
    torch.set_num_threads(threads)
    crowding = max(1.0, sum(SPEEDS.values()) / (os.cpu_count() or 1))
    return PRIVATE_OVERHEAD * crowding * took_s
