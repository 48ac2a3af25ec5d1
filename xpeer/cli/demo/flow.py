"""The demo's flow: public start, a swarm of three daemons, the same peers alone, a report."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from xpeer.cli.demo import corpora, daemons, warmup
from xpeer.cli.demo.exported import loss_of_export
from xpeer.cli.demo.heldout import HeldOut, Snapshots, average_of, mean
from xpeer.cli.demo.plan import (
    EPSILON,
    FULL,
    PROMPTS,
    WINDOW_STEPS,
    DemoPlan,
    PublicStart,
    given_start,
    own_start,
)
from xpeer.cli.demo.report import PeerReport, Report, Sample, plot, say_summary, table_of
from xpeer.cli.demo.view import View
from xpeer.config import Home
from xpeer.errors import LocalError, LocalTimeoutError
from xpeer.policies import privacy_policy
from xpeer.status import Status
from xpeer.training.export import generate
from xpeer.training.model import from_folder
from xpeer.training.tokenizer import ByteTokenizer

ALONE_AT_ONCE = 2
LOOPBACK = "/ip4/127.0.0.1/tcp/0"


class Demo:
    """One run of the demo.

    Args:
        out: folder for all its files.
        seed: random seed of the public start, where the demo makes it.
        plan: how long it takes.
        model: Hugging Face folder of a pretrained model, of which adapters are trained; None = the
            demo makes a small one.

    Raises:
        ConfigError: the folder holds no tokenizer.
    """

    def __init__(
        self, out: Path, seed: int, plan: DemoPlan = FULL, model: Path | None = None
    ) -> None:
        self._seed = seed
        self._out = out
        self._plan = plan
        self._model = model
        self._given = given_start(model, adapters=plan.adapters) if model is not None else None
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
            held_out = HeldOut(self._held_out, from_folder(start.folder))
            by_kind = held_out.of_start()
            report = Report(
                seed=self._seed,
                quick=not self._plan.alone_rates,
                model=str(self._model or ""),
                privacy=self._plan.privacy,
                unit=start.unit,
                start_by_kind=by_kind,
                loss_start=mean(by_kind),
                samples=self._samples(start, held_out.model),
                checkpoint=str(self._run / "model"),
                report=str(self._run / "report.png"),
            )
            self._swarm(start, report, held_out)
            if self._plan.alone_rates:
                self._alone(start, report, held_out)
            plot(report, Path(report.report))
        self._view.print(table_of(report, corpora.LABELS))
        say_summary(report, self._plan.sequence_tokens)
        return report

    # Text and start

    def _write_texts(self) -> list[str]:
        """Write the shards as files for the daemons; returns the public texts."""
        self._view.phase("collecting text from this environment", 4)
        self._held_out: dict[str, torch.Tensor] = {}
        public: list[str] = []
        tokenizer = self._given.tokenizer if self._given else ByteTokenizer()
        tokens, wanted = self._plan.sequence_tokens, self._plan.held_out_records
        for kind in (corpora.PUBLIC, *corpora.PRIVATE):
            corpus = corpora.collect(kind, self._plan.shard_bytes)
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
                records = warmup.records_of(corpus.held_out, tokens, tokenizer)
                spread = max(1, len(records) // wanted)
                self._held_out[kind] = records[::spread][:wanted]
            self._view.advance()
        return public

    def _public_start(self, texts: list[str]) -> PublicStart:
        if self._given is not None:
            self._view.phase("measuring the model before any training", 1)
            return self._given
        plan, cache = self._plan, self._out / "cache"
        self._view.phase("warming up the model on public text (cached)", plan.start_steps)
        return own_start(
            warmup.warmed_up(
                texts, plan.sequence_tokens, self._seed, cache, self._view.to, plan.start_steps
            )
        )

    def _samples(self, start: PublicStart, model: torch.nn.Module) -> list[Sample]:
        """Continue a prompt of each kind, before any training."""
        if self._plan.reply_tokens == 0:
            return []
        self._view.phase("continuing a prompt of each kind", len(PROMPTS))
        samples = []
        for kind, prompt in PROMPTS.items():
            before = generate(model, start.tokenizer, prompt, self._plan.reply_tokens)
            samples.append(Sample(kind, prompt, before))
            self._view.advance()
        return samples

    # The swarm

    def _swarm(self, start: PublicStart, report: Report, held_out: HeldOut) -> None:
        self._view.phase("starting one bootstrap node and three daemons", 4)
        names = list(corpora.PRIVATE)
        homes = {name: Home(self._run / name) for name in names}
        founder, *joiners = names
        fields = {
            "end.steps": self._plan.steps,
            "optimiser.learning_rate": self._plan.rate,
            **self._ends_by_clock(start),
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
        self._start(founder, homes[founder], ["--bootstrap", seed], start)
        for name in joiners:
            peer_id = daemons.call(["id", "--home", str(homes[name].path)])
            token = daemons.call(
                ["invite", "create", "--home", str(homes[founder].path), "--for", peer_id,
                 "--seed", seed]
            )  # fmt: skip
            self._start(name, homes[name], ["--join", token, "--listen", LOOPBACK], start)
            self._view.advance()
        self._follow(homes)
        trained = held_out.of_swarm(homes[founder], start.base_model)
        self._collect(homes, report, trained)
        self._export(homes[founder], start, report, trained)

    def _ends_by_clock(self, start: PublicStart) -> dict[str, float]:
        """With a slow peer windows end by the clock as well, so that it ends with the others."""
        plan, speeds = self._plan, self._plan.speeds.values()
        if min(speeds) == max(speeds):
            return {}
        step_s = warmup.step_seconds(
            start.folder, plan.batch_records, plan.sequence_tokens, sum(speeds)
        )
        window_s = round(WINDOW_STEPS * step_s, 2)
        return {"end.rounds": plan.steps // WINDOW_STEPS, "round.window_s": window_s}

    def _export(self, founder: Home, start: PublicStart, report: Report, held_out: HeldOut) -> None:
        """Export the founder's model, and load the export without xpeer."""
        self._view.phase("exporting, and loading the export without xpeer", 1 + len(report.samples))
        daemons.call(
            ["checkpoint", "export", "--home", str(founder.path), "--hf", report.checkpoint],
            start.settings,
        )  # fmt: skip
        report.loss_exported = loss_of_export(Path(report.checkpoint), start.base, held_out.parts)
        self._view.advance()
        held_out.take(self._snapshots_of(report.peers[0].corpus, founder).last())
        for sample in report.samples:
            sample.after = generate(
                held_out.model, start.tokenizer, sample.prompt, self._plan.reply_tokens
            )
            self._view.advance()

    def _init(
        self, home: Home, name: str, start: PublicStart, corpus: str, fields: dict[str, float]
    ) -> str:
        plan = self._plan
        charges = privacy_policy(plan.privacy).charges
        fields = {
            **fields,
            **plan.round_fields,
            "optimiser.batch_records": plan.batch_records,
            "optimiser.sequence_tokens": plan.sequence_tokens,
            "optimiser.warmup_steps": min(5, plan.steps // 3),
            "round.window_steps": WINDOW_STEPS,
            **(
                {"privacy.epsilon": EPSILON, "privacy.clip_norm": plan.clip_norm} if charges else {}
            ),
        }
        changes = [part for key, value in fields.items() for part in ("--set", f"{key}={value}")]
        return daemons.call(
            ["init", "--home", str(home.path), "--swarm", name, "--model", str(start.folder),
             *start.options, "--privacy", plan.privacy,
             "--public-text", str(self._run / "text" / "public.txt"),
             "--shard", str(self._run / "text" / corpus), "--listen", LOOPBACK, *changes]
        )  # fmt: skip

    def _start(self, name: str, home: Home, arguments: list[str], start: PublicStart) -> None:
        speed = str(self._plan.speeds[name])
        settings = {
            "XPEER_TRAINING_MIN_PEERS": str(len(self._plan.speeds) - 1),
            "XPEER_TRAINING_THREADS": "1",
            "XPEER_TRAINING_SPEED": speed,
            "XPEER_TRAINING_THROTTLE": speed,
            "XPEER_DATA_SHARD": str(self._run / "text" / name),
            **start.settings,
            "XPEER_TRAINING_MICRO_BATCH": str(self._plan.micro_batch),
            "XPEER_CHECKPOINT_EVERY_S": str(self._plan.save_every_s),
        }
        self._processes.start(name, ["start", "--home", str(home.path), *arguments], settings)

    def _follow(self, homes: dict[str, Home]) -> None:
        """Watch the daemons until all have finished."""
        total = self._plan.steps * len(homes)
        self._view.phase("training together", total)
        deadline = time.monotonic() + self._plan.timeout_s
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
            self._snapshots[name] = Snapshots(home.checkpoints, self._plan.curve_steps)
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
                    speed=self._plan.speeds[name],
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
            peer.swarm_by_kind = held_out.by_kind(snapshots.last())
            peer.loss_swarm = mean(peer.swarm_by_kind)
            peer.swarm_curve = snapshots.curve(report.loss_start, held_out, peer.loss_swarm)
            self._view.advance()
        report.bytes_sent = sum(peer.bytes_sent for peer in report.peers)
        report.epsilon = max(peer.epsilon for peer in report.peers)
        report.delta = max(peer.delta for peer in report.peers)
        report.consensus_distance = max((d for d in distances if d is not None), default=None)

    # Alone

    def _alone(self, start: PublicStart, report: Report, held_out: HeldOut) -> None:
        """Train every peer by itself, with the swarm's steps and budget, at several rates.

        The best run of each peer counts.
        """
        peers = [peer for peer in report.peers if peer.corpus in self._plan.alone]
        waiting = sorted(
            ((peer, rate) for peer in peers for rate in self._plan.alone_rates),
            key=lambda job: job[0].steps,  # `pop` takes the last: the longest run first
        )
        total, done = sum(peer.steps for peer, _ in waiting), 0
        best: dict[str, tuple[Snapshots, HeldOut, Home]] = {}
        running: dict[str, tuple[PeerReport, float]] = {}
        homes: dict[str, Home] = {}
        who = "each peer" if len(peers) == len(report.peers) else " and ".join(self._plan.alone)
        self._view.phase(f"{who} alone, to compare; {ALONE_AT_ONCE} at a time", total)
        deadline = time.monotonic() + self._plan.timeout_s
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
                trained = held_out.of_swarm(homes[name], start.base_model)
                by_kind = trained.by_kind(snapshots.last())
                if peer.loss_alone is None or mean(by_kind) < peer.loss_alone:
                    peer.loss_alone, peer.alone_learning_rate = mean(by_kind), rate
                    peer.alone_by_kind, best[peer.corpus] = (
                        by_kind,
                        (snapshots, trained, homes[name]),
                    )
            self._wait(deadline)
        for peer in peers:
            snapshots, trained, _ = best[peer.corpus]
            end = mean(peer.alone_by_kind)
            peer.alone_curve = snapshots.curve(report.loss_start, trained, end)
        if len(peers) == len(report.peers):
            average = average_of([home for _, _, home in best.values()], start.base_model)
            report.loss_alone_averaged = held_out.loss(average)

    def _start_alone(self, name: str, start: PublicStart, peer: PeerReport, rate: float) -> Home:
        home = Home(self._run / name)
        fields = {"end.steps": peer.steps, "optimiser.learning_rate": rate}
        self._init(home, name, start, peer.corpus, fields)
        settings = {"XPEER_TRAINING_THREADS": "1", **start.settings}
        settings["XPEER_TRAINING_MICRO_BATCH"] = str(self._plan.micro_batch)
        settings["XPEER_CHECKPOINT_EVERY_S"] = str(self._plan.save_every_s)
        self._processes.start(name, ["start", "--home", str(home.path), "--bootstrap"], settings)
        return home
