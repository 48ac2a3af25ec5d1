"""Builds a trainer from files: manifest, text, checkpoint or initial model, ledger.

Used by the trainer process, and by programs that train without partners in their own process.
`assemble` lists the steps in order; each function below it does one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from xpeer.accounts.bound import open_register
from xpeer.accounts.ledger import Ledger
from xpeer.accounts.spending import Spending, SwarmSpending
from xpeer.config import Home, NodeConfig, privacy_register
from xpeer.errors import ConfigError
from xpeer.manifest import Manifest
from xpeer.manifest.signed import SignedManifest
from xpeer.mixing.cut import largest
from xpeer.privacy.idle import IdleMechanism
from xpeer.privacy.mechanism import Mechanism, build_mechanism
from xpeer.privacy.options import Options
from xpeer.privacy.steps import Records
from xpeer.shortage import give_back, keep_nothing
from xpeer.trainer.assembled import Assembled, Beginning, TextFacts
from xpeer.trainer.capture import Capture, FrozenValues, Keeping
from xpeer.trainer.comparing import examined
from xpeer.trainer.computing import Computing, computing_of
from xpeer.trainer.declaring import declare_documents, notes_of, warnings_of, warnings_of_lost
from xpeer.trainer.evaluating import evaluation_of
from xpeer.trainer.own_run import OwnRun
from xpeer.trainer.setup import TrainerSetup
from xpeer.trainer.starting import Startup
from xpeer.trainer.text import Text, text_if_any, text_of
from xpeer.training import checkpoint, frozen
from xpeer.training.adapters import factor_pairs, is_adapted
from xpeer.training.checkpoint import Bundle, write_moments
from xpeer.training.flat import FlatParameters
from xpeer.training.initial import model_of
from xpeer.training.loop import TrainingLoop
from xpeer.training.loop_parts import make_loop
from xpeer.training.losses import choose_device
from xpeer.training.measuring import spread
from xpeer.training.model import check_fits
from xpeer.training.pulse import Pulse
from xpeer.training.schedule import Counters
from xpeer.training.tensor_file import clear_staging
from xpeer.training.tokenizer import Tokenizer, load_tokenizer
from xpeer.training.twin import Twin
from xpeer.wire import kernels


@dataclass(frozen=True, slots=True)
class _Swarm:
    """The swarm that a trainer works for, and the home that it works in."""

    setup: TrainerSetup
    home: Home
    manifest: Manifest
    manifest_hash: str
    tokenizer: Tokenizer
    own: OwnRun | None = None
    """A run of own steps; None = the trainer works for the swarm."""

    @property
    def config(self) -> NodeConfig:
        """The operator's settings."""
        return self.setup.config

    @property
    def private(self) -> bool:
        """Whether steps are charged."""
        return self.manifest.privacy.policy.charges

    @property
    def checkpoints(self) -> Path:
        """The folder of this trainer's checkpoints."""
        return self.own.folder if self.own else self.home.checkpoints

    @property
    def spending(self) -> Spending:
        """What its steps may spend."""
        return self.own.spending if self.own else self.swarm_spending

    @property
    def swarm_spending(self) -> SwarmSpending:
        """What the swarm's steps may spend."""
        return SwarmSpending(self.config.privacy.keep_back)


@dataclass(frozen=True, slots=True)
class _Start:
    """The state that training starts from."""

    saved: Bundle | None
    """The newest checkpoint; None = this home's first start."""
    model: torch.nn.Module
    parameters: FlatParameters
    ledger: Ledger
    ledger_id: str
    """The ledger that checkpoints will need; empty without privacy."""
    counters: Counters
    device: torch.device
    computing: Computing
    twin: Twin
    """Of the model, for measurements beside training."""


def assemble(
    setup: TrainerSetup, startup: Startup | None = None, own: OwnRun | None = None
) -> Assembled:
    """Read everything, and resume from the newest checkpoint if there is one.

    Args:
        setup: of the node.
        startup: learns how far the start is.
        own: a run of own steps, which goes on from its own state; None = work for the swarm.

    Raises:
        ConfigError: shard, tokenizer, model, device or checkpoint do not fit the manifest.
        NotAuthorisedError: the manifest is not the swarm's.
        LocalError: the ledger is damaged, or is not the checkpoint's.
    """
    _silence_progress_bars()
    startup = startup or Startup()
    swarm = _open_swarm(setup, own)
    fit = examined(setup, swarm.manifest, startup, lends=own is None)
    if fit.short:
        keep_nothing()
    startup.enter("reads the text")
    arguments = setup, swarm.manifest, swarm.tokenizer, swarm.home
    text, problem = text_if_any(*arguments, startup.tokenised)
    startup.enter("loads the model")
    saved, warnings = (own.saved, []) if own else _load_checkpoint(swarm.home)
    start = _restore(swarm, saved)
    notes, of_accounts = _declare(swarm, start.ledger, text, problem)
    if swarm.private:
        _complete_counters(start)
    pulse = startup.pulse
    startup.enter("tries out how gradients are computed")
    mechanism: Mechanism | IdleMechanism
    if problem:
        mechanism = _idle(swarm, start)
        of_accounts += warnings_of_lost(mechanism.steps_behind)
    else:
        mechanism = _mechanism(swarm, start, text, pulse)
    loop = _loop(swarm, start, mechanism, text.held_out, pulse)
    give_back()  # of what the engines were tested with
    if loop.pacing.ended:  # it would take no step anyway
        problem = ""
    elif problem:
        loop.pacing.begin_idle(budget_spent=mechanism.spent().steps_left == 0)
    beginning = Beginning(
        device=str(start.device),
        precision=start.computing.precision.name,
        resumed=saved is not None,
        text=_facts(swarm, text, problem),
        notes=[
            *(f"text: {line}" for line in text.shard.lines()),
            *(f"room: {note}" for note in fit.notes),
            *notes,
            *start.computing.notes,
            *mechanism.notes,
        ],
        warnings=[*fit.warnings, *warnings, *of_accounts, *text.warnings],
        steps_forfeited=_forfeited(start) if swarm.private else 0,
        uncompiled=start.computing.uncompiled,
    )
    return _assembled(swarm, start, loop, mechanism, beginning)


def _open_swarm(setup: TrainerSetup, own: OwnRun | None) -> _Swarm:
    """Read the manifest and the tokenizer."""
    config = setup.config
    signed = SignedManifest.load(Path(setup.manifest_path))
    manifest = signed.open(setup.swarm_id)
    manifest.require_privacy(config.data.privacy, config.privacy.max_epsilon)
    tokenizer = load_tokenizer(
        manifest.tokenizer, config.data.tokenizer, base_model=config.data.base_model
    )
    digest = signed.genesis.manifest_hash.hex()
    manifest = own.manifest if own else manifest
    return _Swarm(setup, Home(Path(setup.home)), manifest, digest, tokenizer, own)


def _load_checkpoint(home: Home) -> tuple[Bundle | None, list[str]]:
    """Load the newest checkpoint that can be read, with a warning for each that can't."""
    for folder in (home.checkpoints, home.cache):
        clear_staging(folder)
    return checkpoint.load_latest(home.checkpoints)


def _restore(swarm: _Swarm, saved: Bundle | None) -> _Start:
    """Build the model with the checkpoint's parameters, and open the ledger that it needs."""
    manifest = swarm.manifest
    device, why = choose_device(swarm.config.training.device, private=swarm.private)
    fresh = saved is None and swarm.setup.initial == "initial"
    model = _model(swarm, device, fresh=fresh)
    parameters = FlatParameters(model, manifest.round.fragments)
    if parameters.num_params != manifest.model.num_params:
        raise ConfigError(
            f"the model has {parameters.num_params} parameters, the manifest "
            f"{manifest.model.num_params}",
            "use the transformers version that the founder used",
        )
    demanded = (saved.ledger_id or None) if saved else None
    ledger = Ledger.open(swarm.home.ledger_db, must_exist=demanded)
    ledger_id = ledger.id if swarm.private else ""
    counters = Counters()
    if saved is not None:
        saved.require(swarm.manifest_hash, ledger_id, parameters.num_params)
        parameters.write(saved.flat)
        saved.forget()
        frozen.restore(model, manifest.model.frozen, saved.frozen)
        counters = Counters.from_dict(saved.counters)
    # before anything is hooked onto the model
    twin = Twin(model, manifest.optimiser.sequence_tokens)
    computing = computing_of(swarm.config.training, model, device, manifest)
    if why:
        computing.notes.insert(0, why)
    return _Start(saved, model, parameters, ledger, ledger_id, counters, device, computing, twin)


def _model(swarm: _Swarm, device: torch.device, *, fresh: bool) -> torch.nn.Module:
    """Build the model on its device; with the initial parameters if fresh, else with any."""
    config, manifest = swarm.config, swarm.manifest
    kernels.configure(compile=config.training.compile_codec and _has_large_payloads(manifest))
    model = model_of(manifest, swarm.home, config.data.base_model, fresh=fresh).to(device)
    check_fits(model, swarm.tokenizer.vocab_size, manifest.optimiser.sequence_tokens)
    return model


def _has_large_payloads(manifest: Manifest) -> bool:
    """Whether exchanges need compiled kernels; torch's compiler alone takes 150 MB."""
    of = manifest.round
    return kernels.is_large(of.policy.vectors * largest(manifest.model.num_params, of.fragments))


def _declare(
    swarm: _Swarm, ledger: Ledger, text: Text, problem: str
) -> tuple[list[str], list[str]]:
    """Declare the text's documents to the ledger; returns notes and warnings on their accounts."""
    if not swarm.private or problem:
        return [], []
    joined = declare_documents(ledger, swarm.setup, swarm.manifest, text, own=swarm.own is not None)
    return notes_of(joined, ledger), warnings_of(joined)


def _idle(swarm: _Swarm, start: _Start) -> IdleMechanism:
    """Make a mechanism that takes no step.

    It asks the machine's register what the documents of the missing text were charged.
    """
    folder, ledger = privacy_register(swarm.config), start.ledger
    register = open_register(ledger, folder) if swarm.private else None
    seen = start.saved.seen if start.saved is not None else None
    arguments = swarm.setup.swarm_id, ledger, register, seen, swarm.swarm_spending
    return IdleMechanism(swarm.manifest, *arguments)


def _mechanism(swarm: _Swarm, start: _Start, text: Text, pulse: Pulse) -> Mechanism:
    """Make the mechanism that computes the gradients."""
    computing = start.computing
    return build_mechanism(
        swarm.manifest,
        start.model,
        text.records,
        pulse.before(computing.packed or computing.losses),
        start.ledger,
        Options(
            micro_batch=swarm.config.training.micro_batch,
            memory_bytes=computing.memory_bytes,
            precision=computing.precision,
            relieve=computing.relieve,
            divide=computing.packed.divide if computing.packed else None,
            generator=swarm.config.privacy.generator,
            cache=swarm.home.cache,
            clip_norm=start.counters.clip_norm,
        ),
        owners=text.owners,
        seen=start.saved.seen if start.saved is not None else None,
        spending=swarm.spending,
    )


def _loop(
    swarm: _Swarm, start: _Start, mechanism: Mechanism, held_out: Records, pulse: Pulse
) -> TrainingLoop:
    """Make the loop, with the checkpoint's state of rule and optimiser."""
    saved = start.saved
    loop = make_loop(
        swarm.manifest,
        start.parameters,
        mechanism,
        evaluation_of(
            *(swarm.manifest, swarm.tokenizer, start.model, start.twin, start.computing),
            spread(held_out, swarm.config.training.validation_records),
            pulse.beat,
        ),
        adapters=factor_pairs(start.model) if is_adapted(start.model) else None,
        counters=start.counters,
        pulse=pulse,
        throttle=swarm.config.training.throttle,
        awaiting=saved is None and swarm.setup.initial == "awaited",
    )
    if saved is not None:
        loop.exchanges.restore(saved.rule)
        write_moments(
            loop.learner.optimiser,
            start.parameters.parameters(),
            saved.exp_avg,
            saved.exp_avg_sq,
            saved.optimiser_step,
            saved.forget,
        )
    return loop


def _facts(swarm: _Swarm, text: Text, problem: str) -> TextFacts:
    arguments = swarm.setup, swarm.manifest, swarm.tokenizer, swarm.home.cache
    return TextFacts(
        num_records=len(text.records),
        corpus=text.share,
        shard=text.shard,
        problem=problem,
        look_again=partial(text_of, *arguments) if problem else None,
    )


def _assembled(
    swarm: _Swarm, start: _Start, loop: TrainingLoop, mechanism: Mechanism, beginning: Beginning
) -> Assembled:
    """Put the parts into one object, with a writer of checkpoints."""
    frozen_values = FrozenValues(start.model, swarm.manifest.model.frozen)
    keep = swarm.config.checkpoint.keep
    keeping = Keeping(swarm.checkpoints, keep, start.ledger_id, swarm.manifest_hash)
    return Assembled(
        trainer=loop,
        mechanism=mechanism,
        ledger=start.ledger,
        model=start.model,
        tokenizer=swarm.tokenizer,
        frozen=frozen_values,
        checkpoints=Capture(loop, mechanism, frozen_values, keeping),
        beginning=beginning,
    )


def _forfeited(start: _Start) -> int:
    """Steps that this home was charged for, but that its parameters do not contain."""
    ledger = start.ledger
    own = sum(segment.steps for segment in ledger.own_segments())
    return max(0, ledger.steps_charged - own - start.counters.charges_used)


def _complete_counters(start: _Start) -> None:
    """Set `charges_used`, which checkpoints of earlier versions lack."""
    counters, saved = start.counters, start.saved
    if saved is not None and "charges_used" not in saved.counters:
        steps = counters.step - (counters.moments_step if counters.joined else 0)
        counters.charges_used = min(steps, start.ledger.steps_charged)


def _silence_progress_bars() -> None:
    from transformers.utils.logging import disable_progress_bar  # noqa: PLC0415 - takes seconds

    disable_progress_bar()
