"""Builds a `TrainingLoop` from files: manifest, shard, model or checkpoint, ledger.

For the trainer process, and for whoever trains without partners in its own process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import msgspec
import torch

from xpeer.config import Home, NodeConfig, privacy_register
from xpeer.errors import ConfigError, LocalError, PeerError, Reason, ShardError
from xpeer.manifest import Manifest, SignedManifest
from xpeer.privacy.budget import delta_of
from xpeer.privacy.charges import About
from xpeer.privacy.histories import Joined
from xpeer.privacy.idle import IdleMechanism
from xpeer.privacy.ledger import Ledger
from xpeer.privacy.mechanism import Mechanism, build_mechanism
from xpeer.privacy.register import Register
from xpeer.status import CorpusShare, PrivacySpent, ShardSummary
from xpeer.training import checkpoint, combine, frozen, parts, rules
from xpeer.training.buffers import Buffers
from xpeer.training.checkpoint import Bundle, read_moments, write_moments
from xpeer.training.consolidation import Shown, consolidate, packed
from xpeer.training.documents import document_of, read_shard
from xpeer.training.exchanges import Exchanges
from xpeer.training.flat import FlatParameters
from xpeer.training.gradient_window import GradientWindow
from xpeer.training.initial import model_of
from xpeer.training.learner import Learner
from xpeer.training.loop import TrainingLoop
from xpeer.training.losses import choose_device, evaluate, record_losses
from xpeer.training.measuring import Measurements
from xpeer.training.model import check_fits
from xpeer.training.pacing import Pacing
from xpeer.training.partition import divide, refuse_other
from xpeer.training.parts import Evaluation, Parameters
from xpeer.training.pulse import Pulse
from xpeer.training.schedule import Counters
from xpeer.training.setup import TrainerSetup
from xpeer.training.shard import cut, load_owned_records, load_records, split
from xpeer.training.tensorfile import clear_staging
from xpeer.training.timings import Timings
from xpeer.training.tokenizer import Tokenizer, load_tokenizer
from xpeer.wire import kernels
from xpeer.wire.fixedpoint import grid_of

PUBLIC_RECORDS: Final = 64
"""Of the public text; evenly spread over it, the same at every peer."""


@dataclass(slots=True)
class Assembled:
    """A trainer and what belongs to it."""

    trainer: TrainingLoop
    mechanism: Mechanism
    ledger: Ledger
    home: Home
    ledger_id: str
    """What checkpoints demand; empty without privacy."""
    manifest_hash: str
    keep_checkpoints: int
    model: torch.nn.Module
    tokenizer: Tokenizer
    device: str
    num_records: int
    corpus: CorpusShare | None
    shard: ShardSummary
    resumed: bool
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    steps_forfeited: int = 0
    """Charged, and not behind the parameters that training began with."""
    look_again: Callable[[], object] | None = None
    """Of a trainer without text: reads it, or raises ShardError; None = there is text."""
    text_problem: str = ""
    _frozen: torch.Tensor | None = field(default=None, init=False)
    """A copy, made when it is first asked for: it changes for a joiner alone."""
    _buffers: Buffers = field(default_factory=lambda: Buffers(3), init=False)

    @property
    def engine(self) -> str:
        """How per-record gradients are clipped."""
        return self.mechanism.engine

    def ledger_counter(self) -> int:
        """Privacy charges so far."""
        return self.ledger.counter

    def spent(self) -> PrivacySpent:
        """What the ledger was charged, and when it ends; may take a moment, on any thread."""
        found = self.mechanism.spent()
        if found.steps_left is None:
            return found
        ends = self.ledger.ends_unix_s(found.steps_left)
        return msgspec.structs.replace(
            found,
            ends_unix_s=ends,
            documents_elsewhere=self.ledger.documents_elsewhere(),
            steps_forfeited=self.steps_forfeited,
        )

    def frozen_values(self) -> torch.Tensor:
        """What no text reaches: (n,) float32, CPU; not to be written to."""
        if self._frozen is None:
            self._frozen = frozen.values(self.model, self.trainer.manifest.model.frozen)
        return self._frozen

    def replace_frozen(self, flat: torch.Tensor) -> None:
        """A joiner's.

        Raises:
            PeerError: not those that the manifest means (WRONG_MODEL); ours stay.
        """
        try:
            frozen.restore(self.model, self.trainer.manifest.model.frozen, flat)
            self._frozen = None
        except LocalError as e:
            raise PeerError(Reason.WRONG_MODEL, e.problem) from e

    def capture(self) -> Callable[[], str]:
        """At a boundary: copy everything a checkpoint holds.

        Returns:
            To be called on any thread: writes it; its path.
        """
        trainer = self.trainer
        trained = list(trainer.parameters.parameters())
        flat, *moments = (self._buffers.take(trainer.parameters.num_params) for _ in range(3))
        exp_avg, exp_avg_sq, optimiser_step = read_moments(
            trainer.learner.optimiser, trained, (moments[0], moments[1])
        )
        bundle = Bundle(
            flat=trainer.parameters.read(flat),
            exp_avg=exp_avg,
            exp_avg_sq=exp_avg_sq,
            optimiser_step=optimiser_step,
            rule={name: value.clone() for name, value in trainer.exchanges.state().items()},
            seen=self.mechanism.seen,
            frozen=self.frozen_values(),
            counters=trainer.counters.to_dict(),
            ledger_id=self.ledger_id,
            manifest_hash=self.manifest_hash,
        )
        received = trainer.exchanges.consolidation.now()
        return lambda: self._save(bundle, received)

    def _save(self, bundle: Bundle, received: dict[int, tuple[Shown, ...]]) -> str:
        if not bool(torch.isfinite(bundle.flat).all()):
            raise LocalError(
                f"the parameters of step {bundle.step} are not finite: they are not saved",
                "training diverged; the checkpoint before is kept",
            )
        own = bundle.flat, bundle.exp_avg, bundle.exp_avg_sq
        if received:
            averaged = consolidate(bundle.flat, self.trainer.exchanges.fragments, received)
            bundle = replace(bundle, consolidation=packed(bundle.flat, averaged))
        pulse = self.trainer.pulse
        pulse.beat()
        folder, keep = self.home.checkpoints, self.keep_checkpoints
        path = str(checkpoint.save(folder, bundle, keep=keep, told=pulse.wrote))
        for tensor in own:  # the next checkpoint stops the training for a fraction of the time
            self._buffers.give(tensor)
        return path

    def close(self) -> None:
        """Wait for the ledger's disk, and close it."""
        self.mechanism.close()
        self.ledger.close()


def assemble(setup: TrainerSetup) -> Assembled:
    """Read everything, resume from the newest checkpoint if there is one.

    Raises:
        ConfigError: shard, tokenizer, model, device or checkpoint do not fit.
        NotAuthorisedError: the manifest is not the swarm's.
        LocalError: the ledger is damaged, or is not the checkpoint's.
    """
    _silence_progress_bars()
    home, config = Home(Path(setup.home)), setup.config
    signed = SignedManifest.load(Path(setup.manifest_path))
    manifest = signed.open(setup.swarm_id)
    manifest.require_privacy(config.data.privacy, config.privacy.max_epsilon)
    manifest_hash = signed.genesis.manifest_hash.hex()
    tokenizer = load_tokenizer(
        manifest.tokenizer, config.data.tokenizer, base_model=config.data.base_model
    )
    text, problem = _text_if_any(setup, manifest, tokenizer, home)
    for folder in (home.checkpoints, home.cache):
        clear_staging(folder)
    saved, warnings = checkpoint.load_latest(home.checkpoints)
    device = choose_device(config.training.device)
    kernels.configure(compile=config.training.compile_codec)
    model = model_of(
        manifest,
        home,
        config.data.base_model,
        fresh=saved is None and setup.initial == "initial",
    ).to(device)
    check_fits(model, tokenizer.vocab_size, manifest.optimiser.sequence_tokens)
    parameters = FlatParameters(model, manifest.round.fragments)
    if parameters.num_params != manifest.model.num_params:
        raise ConfigError(
            f"the model has {parameters.num_params} parameters, the manifest "
            f"{manifest.model.num_params}",
            "use the transformers version that the founder used",
        )
    private = manifest.privacy.mode != "off"
    ledger = Ledger.open(home.ledger_db, must_exist=(saved.ledger_id or None) if saved else None)
    ledger_id = ledger.id if private else ""
    if saved is not None:
        saved.require(manifest_hash, ledger_id, parameters.num_params)
        parameters.write(saved.flat)
        frozen.restore(model, manifest.model.frozen, saved.frozen)

    counters = Counters() if saved is None else Counters.from_dict(saved.counters)

    notes = []
    if private and not problem:
        joined = _declare_documents(ledger, setup, manifest, text)
        notes = _notes_of(joined, ledger)
        warnings += _warnings_of(joined)
    pulse = Pulse()

    seen = saved.seen if saved is not None else None
    mechanism: Mechanism | IdleMechanism
    if problem:
        mechanism = _idle(manifest, setup, ledger, seen)
        warnings += _behind(mechanism.steps_behind)
    else:
        mechanism = build_mechanism(
            manifest,
            model,
            text.records,
            pulse.before(record_losses),
            ledger,
            micro_batch=config.training.micro_batch,
            seen=seen,
            owners=text.owners,
            generator=config.privacy.generator,
            clip_norm=counters.clip_norm,
            cache=home.cache,
        )
    trainer = make_loop(
        manifest,
        parameters,
        mechanism,
        _evaluation(manifest, config, model, tokenizer, text.held_out, pulse.beat),
        counters=counters,
        pulse=pulse,
        throttle=config.training.throttle,
        awaiting=saved is None and setup.initial == "awaited",
    )
    _resume(trainer, parameters, saved)
    if trainer.pacing.ended:  # it takes no step anyway
        problem = ""
    elif isinstance(mechanism, IdleMechanism):
        trainer.pacing.begin_idle(budget_spent=mechanism.spent().steps_left == 0)
    return Assembled(
        trainer=trainer,
        mechanism=mechanism,
        ledger=ledger,
        home=home,
        ledger_id=ledger_id,
        manifest_hash=manifest_hash,
        keep_checkpoints=config.checkpoint.keep,
        model=model,
        tokenizer=tokenizer,
        device=str(device),
        num_records=len(text.records),
        corpus=text.share,
        shard=text.shard,
        resumed=saved is not None,
        notes=[*(f"text: {line}" for line in text.shard.lines()), *notes, *mechanism.notes],
        warnings=warnings,
        steps_forfeited=_forfeited(counters, saved, ledger) if private else 0,
        look_again=(lambda: text_of(setup, manifest, tokenizer, home)) if problem else None,
        text_problem=problem,
    )


def make_loop(
    manifest: Manifest,
    parameters: Parameters,
    mechanism: parts.Mechanism,
    evaluation: Evaluation,
    *,
    counters: Counters | None = None,
    pulse: Pulse | None = None,
    throttle: float = 1.0,
    awaiting: bool = False,
) -> TrainingLoop:
    """A loop and its parts.

    Args:
        manifest: of the swarm.
        parameters: of the model.
        mechanism: makes the gradients.
        evaluation: measures the losses.
        counters: of a checkpoint; None = begin at zero.
        pulse: signs of life of this process.
        throttle: fraction of the time to compute in.
        awaiting: the parameters are still to be imported; nothing is trained or sent before.
    """
    counters = Counters() if counters is None else counters
    timings, rule = Timings(), rules.make(manifest.round)
    exchanges = Exchanges(
        parameters,
        manifest.round.codec,
        mechanism,
        rule,
        grid_of(manifest.round),
        combine.make(manifest.round),
    )
    exchanges.begin()
    return TrainingLoop(
        Learner(manifest, parameters, mechanism, GradientWindow(rule), counters),
        exchanges,
        Pacing(manifest, mechanism, counters, timings),
        Measurements(evaluation, manifest.round),
        timings,
        pulse or Pulse(),
        throttle=throttle,
        awaiting=awaiting,
    )


def _resume(trainer: TrainingLoop, parameters: FlatParameters, saved: Bundle | None) -> None:
    """What the rule and the optimiser knew."""
    if saved is None:
        return
    trainer.exchanges.restore(saved.rule)
    write_moments(
        trainer.learner.optimiser,
        parameters.parameters(),
        saved.exp_avg,
        saved.exp_avg_sq,
        saved.optimiser_step,
    )


def _forfeited(counters: Counters, saved: Bundle | None, ledger: Ledger) -> int:
    """Charges of this home that are not behind the parameters it goes on from."""
    if saved is not None and "charges_used" not in saved.counters:  # of an earlier version
        steps = counters.step - (counters.moments_step if counters.joined else 0)
        counters.charges_used = min(steps, ledger.steps_charged)
    return max(0, ledger.steps_charged - counters.charges_used)


def _about(manifest: Manifest, swarm_id: str, text: Text) -> About:
    """What the ledger notes beside each charge."""
    rules, length = manifest.privacy, manifest.optimiser.sequence_tokens
    about = About(swarm_id, rules.mode, rules.clip_norm, 0.0, rules.epsilon)
    if rules.unit == "document":
        delta = delta_of(manifest, len(set(text.owners.tolist())))
        return msgspec.structs.replace(about, delta=delta, unit="document")
    tokens = manifest.tokenizer.digest[:16] or manifest.tokenizer.kind
    return msgspec.structs.replace(
        about, delta=delta_of(manifest, len(text.records)), cut=f"{length} {tokens} tokens"
    )


def _declare_documents(
    ledger: Ledger, setup: TrainerSetup, manifest: Manifest, text: Text
) -> Joined:
    """Have charges counted for these documents on the whole machine."""
    register = Register.open(privacy_register(setup.config))
    return ledger.declare_documents(
        register, text.documents, _about(manifest, setup.swarm_id, text)
    )


def _idle(
    manifest: Manifest, setup: TrainerSetup, ledger: Ledger, seen: torch.Tensor | None
) -> IdleMechanism:
    """Takes no step, and has the machine's register asked what the missing text was charged."""
    private = manifest.privacy.mode != "off"
    register = Register.open(privacy_register(setup.config)) if private else None
    return IdleMechanism(manifest, setup.swarm_id, ledger, register, seen)


def _notes_of(joined: Joined, ledger: Ledger) -> list[str]:
    """What the operator should know of the documents' accounts."""
    notes = []
    if joined.elsewhere:
        notes.append(
            f"privacy: {joined.elsewhere} of {joined.documents} documents were trained on by "
            "other homes of this machine; their account goes on"
        )
    if joined.new and ledger.counter:
        notes.append(
            f"privacy: {joined.new} of {joined.documents} documents are new to this machine and "
            "begin with a whole budget; text that was merely altered counts as new, too"
        )
    return notes


def _warnings_of(joined: Joined) -> list[str]:
    """Which files were lost or restored."""
    warnings = []
    if joined.recovered_steps:
        warnings.append(
            f"privacy: the machine's register lacked {joined.recovered_steps} steps of this "
            "home's ledger; they count for all documents that this home has or will have"
        )
    elif joined.unknown_steps:
        warnings.append(
            f"privacy: {joined.unknown_steps} steps of this home's ledger were once lost to the "
            "machine's register; they count for all of its documents, new ones included"
        )
    return warnings + _behind(joined.steps_behind)


def _behind(steps: int) -> list[str]:
    if not steps:
        return []
    return [
        f"privacy: this home's ledger lacked {steps} steps that the machine's register holds (an "
        "older copy was restored, or the node died while charging); they are charged to it again"
    ]


@dataclass(frozen=True, slots=True)
class Text:
    """What a node trains on."""

    records: torch.Tensor  # (n, T) int64
    owners: torch.Tensor  # (n,) int64: the number of each record's document
    documents: list[str]
    """Ids; of pieces those of the whole."""
    held_out: torch.Tensor  # (m, T) int64
    shard: ShardSummary
    share: CorpusShare | None
    """Of a shared corpus."""


def _text_if_any(
    setup: TrainerSetup, manifest: Manifest, tokenizer: Tokenizer, home: Home
) -> tuple[Text, str]:
    """The text; or none, and why, where that may pass.

    Raises:
        ShardError: this home has never trained, or names no text at all.
    """
    try:
        return text_of(setup, manifest, tokenizer, home), ""
    except ShardError as e:
        data = setup.config.data
        if not (setup.has_trained and (data.corpus or data.shard)):
            raise
        empty = torch.empty((0, manifest.optimiser.sequence_tokens), dtype=torch.int64)
        return Text(empty, empty[:, 0], [], empty, ShardSummary(), None), str(e)


def text_of(setup: TrainerSetup, manifest: Manifest, tokenizer: Tokenizer, home: Home) -> Text:
    """The shard, or this node's part of the corpus, as the trainer reads it.

    Args:
        setup: names the files.
        manifest: of the swarm.
        tokenizer: of the swarm.
        home: whose cache is used.

    Raises:
        ShardError: there is no text, or it can't be read.
    """
    data, shared = setup.config.data, manifest.shared_corpus
    patterns, setting = (data.corpus, "data.corpus") if shared else (data.shard, "data.shard")
    found = read_shard(patterns, data.text_field, setting)
    documents = found.documents
    if shared:
        refuse_other(shared, documents)
    training, held_out = split(documents, data.validation_share, data.split)
    share = None
    if shared:
        # held out before it is shared: what one member measures on, none trains on
        training, share = divide(training, manifest, setup.members, setup.peer_id)
    length = manifest.optimiser.sequence_tokens
    records, owners = load_owned_records(training, tokenizer, length, home.cache)
    if share is not None:
        share = msgspec.structs.replace(share, tokens=int((records >= 0).sum()))
    try:
        validation = load_records(held_out, tokenizer, length, home.cache)
    except ShardError:  # a single document, or too little held out for one record
        validation = records[:0]
    ids = [document.whole or document.id for document in training]
    too_short = len(training) - len(set(owners.tolist()))
    summary = msgspec.structs.replace(found.summary, too_short=too_short)
    return Text(records, owners, ids, validation, summary, share)


def _evaluation(
    manifest: Manifest,
    config: NodeConfig,
    model: torch.nn.Module,
    tokenizer: Tokenizer,
    held_out: torch.Tensor,
    told: Callable[[], None],
) -> Evaluation:
    document = document_of(manifest.public_text.text, "public text")
    length = manifest.optimiser.sequence_tokens
    public = _spread(cut([document], tokenizer, length), PUBLIC_RECORDS)
    private = _spread(held_out, config.training.validation_records)
    return Evaluation(
        public=lambda: evaluate(model, public, told=told),
        validation=(lambda: evaluate(model, private, told=told)) if len(private) else None,
    )


def _spread(records: torch.Tensor, at_most: int) -> torch.Tensor:
    """Evenly spread rows."""
    if len(records) <= at_most:
        return records
    return records[torch.linspace(0, len(records) - 1, at_most).long()]


def _silence_progress_bars() -> None:
    from transformers.utils.logging import disable_progress_bar  # noqa: PLC0415 - takes seconds

    disable_progress_bar()
