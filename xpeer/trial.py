"""A trial: a small run before anything is signed or started. It fails where nodes would fail later.

It runs the trainer's own code. It builds model and tokenizer from the manifest, takes a step with
the privacy mechanism's own engine, and makes an exchange with itself. It saves the model, rebuilds
it from its config as a restart does, exports it, and loads the export. All of this uses the
manifest's public text, in a folder that is removed at the end: no private text is read, and nothing
is charged or kept.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import msgspec
import torch
from msgspec import structs

from xpeer.accounts import accountant
from xpeer.accounts.accountant import Segment
from xpeer.accounts.budget import coarse_size, delta_of
from xpeer.config import Home, NodeConfig
from xpeer.errors import ConfigError, LocalError, PeerError, Reason
from xpeer.estimate import room
from xpeer.forms import Form
from xpeer.identity import Identity
from xpeer.manifest import Manifest
from xpeer.manifest.signed import SignedManifest
from xpeer.trainer.assembled import Assembled
from xpeer.trainer.build import assemble
from xpeer.trainer.setup import TrainerSetup
from xpeer.training import checkpoint, model
from xpeer.training.initial import source_folders, trained_model
from xpeer.training.kept import Source
from xpeer.training.tokenizer import Tokenizer, load_tokenizer
from xpeer.update import PeerUpdate
from xpeer.wire import fixedpoint

Report = Callable[[str], None]
_MOST_TOKENS: Final = 2_000_000
"""Most tokens of the trial's text, which repeats the public text."""
_LARGEST_SHARD: Final = 10**6
"""Records of the largest shard that is considered. A larger shard needs less noise."""
_EPSILON, _SIGMA = 10.0, 1.0
"""The trial's budget and noise, in place of the manifest's. A few steps fit at any rate of
sampling, and are counted quickly. `require_reachable` checks the manifest's own budget."""
_TINY: Final = 0.01
"""With the largest noise, any larger epsilon can be kept, however many steps there are."""
_LARGE: Final = 1e9
"""Trained parameters are never larger. If they are, the learning rate is a slip."""
_PIECE: Final = 1 << 18
"""Values that are compared at a time."""
_CLOSE: Final = 1e-3
"""Largest relative difference of logits of the same model, since the order of sums differs."""


@dataclass(frozen=True)
class Trial:
    """What the trial measured."""

    num_params: int
    device: str
    engine: str
    step_s: float
    tokens_per_step: float
    host_bytes: int
    """Peak memory of the process, including model, optimiser and engine."""
    device_bytes: int
    """Peak memory on the GPU; 0 on a CPU."""


@dataclass(frozen=True)
class _Trained:
    """What is left of the trial's trainer: a restart is compared with it."""

    tokenizer: Tokenizer
    device: torch.device
    ids: torch.Tensor  # (1, T) int64
    logits: torch.Tensor  # (1, T, vocabulary) float32, CPU
    began: float
    """When the checkpoint was begun, monotonic s."""


def require_reachable(manifest: Manifest) -> None:
    """Refuse a budget that no shard can keep, however large it is. Takes a moment.

    Raises:
        ConfigError: not even one step fits, or no noise is enough for all steps.
    """
    rules, end = manifest.privacy, manifest.end
    if not rules.policy.clips_records:
        return
    size = coarse_size(max(_LARGEST_SHARD, manifest.optimiser.batch_records))
    q = min(manifest.optimiser.batch_records, size) / size
    delta = delta_of(manifest, size)
    sigma, steps = rules.noise_multiplier, 1
    if sigma is None:
        if rules.epsilon > _TINY:
            return
        sigma, steps = accountant.SIGMA_MAX, end.steps or 1
    cost = accountant.epsilon([Segment(sigma, q, steps)], delta)
    if cost <= rules.epsilon:
        return
    if rules.noise_multiplier is not None:
        raise ConfigError(
            f"manifest privacy.noise_multiplier = {sigma:g}: a single step costs epsilon "
            f"{cost:.3g} even in a shard of {size:,} records, and privacy.epsilon is "
            f"{rules.epsilon:g}",
            "set more noise, or leave it out: each node then calibrates its own",
        )
    raise ConfigError(
        f"manifest privacy.epsilon = {rules.epsilon:g} can't be reached with end.steps = "
        f"{end.steps}, whatever the noise",
        "raise privacy.epsilon, or plan fewer steps",
    )


def rehearse(
    manifest: Manifest,
    source: Home,
    config: NodeConfig,
    near: Path,
    report: Report,
    *,
    steps: int = 1,
    export: bool = True,
) -> Trial:
    """Do once everything that a node will do.

    Args:
        manifest: signed, or about to be signed.
        source: the home with the initial model; a joiner's has none.
        config: of the node: device, threads, folders of tokenizer and base model.
        near: a folder on the home's disk, for files that are removed at the end.
        report: called with each line on the trial's progress.
        steps: number of steps; the last one is timed.
        export: True = also save, rebuild, export, and load again.

    Raises:
        LocalError: a node would stop with this error.
    """
    room.give_back()  # the founder's own copies of the model
    with _staged(near) as folder:
        setup = _setup(manifest, source, config, folder)
        trial, trained = _train(setup, manifest, report, steps=steps, export=export)
        room.give_back()
        if trained is not None:
            _restart_and_export(trained, manifest, setup, folder, report)
        return replace(trial, host_bytes=room.host_peak())


def _train(
    setup: TrainerSetup, manifest: Manifest, report: Report, *, steps: int, export: bool
) -> tuple[Trial, _Trained | None]:
    """Take the steps, and exchange. The trainer, its model and its moments are gone afterwards.

    Returns:
        What was measured; and with `export` what a restart is compared with.
    """
    began = time.monotonic()
    report("building the model, and choosing how its gradients are clipped ...")
    made = assemble(setup)
    try:
        if made.trainer.awaiting:  # a joiner's trial begins with any values
            made.trainer.awaiting = False
        num_params = made.trainer.parameters.num_params
        report(f"  {_count(num_params)} parameters on {made.beginning.device}, {_since(began)}")
        step_s, tokens = _step(made, manifest, steps, report)
        _exchange(made, manifest, report)
        trained = _saved(made) if export else None
    finally:
        made.close()
    names = made.beginning.device, made.mechanism.engine
    peak = room.device_peak(torch.device(made.beginning.device))
    return Trial(num_params, *names, step_s, tokens, 0, peak), trained


def _setup(manifest: Manifest, source: Home, config: NodeConfig, folder: Path) -> TrainerSetup:
    """Make the trial's home: the manifest with another budget, and public text as the shard."""
    home = Home(folder / "home")
    home.path.mkdir()
    rules = manifest.privacy
    if rules.policy.charges:
        sigma = min(_SIGMA, 1.9 * (rules.clip_count_noise or 1.0))  # it must stay below twice that
        epsilon = _EPSILON * (_SIGMA / sigma) ** 2
        rules = structs.replace(rules, epsilon=epsilon, noise_multiplier=sigma, delta=None)
    tried = structs.replace(manifest, privacy=rules, shared_corpus=None)
    signed = SignedManifest.sign(tried, Identity.generate())
    home.manifest.write_bytes(signed.to_bytes())
    if source.initial_model.exists():
        home.initial_model.symlink_to(source.initial_model, target_is_directory=True)
    tokenizer = load_tokenizer(
        manifest.tokenizer, config.data.tokenizer, base_model=config.data.base_model
    )
    text = folder / "public.jsonl"
    _write_text(text, manifest, tokenizer)
    return TrainerSetup(
        manifest_path=str(home.manifest),
        swarm_id=signed.genesis.swarm_id,
        home=str(home.path),
        config=structs.replace(
            config,
            data=structs.replace(
                config.data, shard=[str(text)], corpus=[], text_field="text", split="document"
            ),
            privacy=structs.replace(
                config.privacy, register=str(folder / "register"), max_epsilon=0.0, keep_back=0.0
            ),
            training=structs.replace(
                config.training, throttle=1.0, check_fit="skip", compile_codec=False
            ),
        ),
        peer_id="trial",
        initial="initial" if source.initial_model.exists() else "awaited",
    )


def _write_text(file: Path, manifest: Manifest, tokenizer: Tokenizer) -> None:
    """Write documents of about a record each, so many that a batch is a sample of them."""
    text, length = manifest.public_text.text, manifest.optimiser.sequence_tokens
    start = text[:20_000]
    characters = max(1, round(length * len(start) / max(1, len(tokenizer.encode(start)))))
    batch = manifest.optimiser.batch_records
    wanted = max(2 * batch, min(8 * batch, _MOST_TOKENS // length), 8)
    rows = (
        f"{n} {(text * (1 + characters // len(text)))[at : at + characters]}"
        for n in range(wanted)
        for at in [n * characters % max(1, len(text) - characters + 1)]
    )
    with file.open("wb") as opened:
        for row in rows:
            opened.write(msgspec.json.encode({"text": row}) + b"\n")


def _step(made: Assembled, manifest: Manifest, steps: int, report: Report) -> tuple[float, float]:
    private = "private " if manifest.privacy.policy.charges else ""
    trainer, step_s = made.trainer, 0.0
    for number in range(steps):
        began = time.monotonic()
        trainer.run(1)
        step_s = time.monotonic() - began
        report(f"one {private}step on public text ({made.mechanism.engine}) ... {step_s:.2g} s")
        if trainer.counters.step <= number:
            raise LocalError("the trial took no step: the run ends before it begins", "see end.*")
    values = trainer.parameters.read()
    if not all(
        float(piece.abs().max()) < _LARGE for piece in torch.split(values, _PIECE)
    ):  # nan, too
        raise ConfigError(
            f"manifest optimiser.learning_rate = {manifest.optimiser.learning_rate:g}: after "
            f"{steps} steps of the trial the parameters are not finite, or very large",
            "set a smaller one",
        )
    return step_s, trainer.counters.tokens / trainer.counters.step


def _exchange(made: Assembled, manifest: Manifest, report: Report) -> None:
    """Exchange with oneself: the payload that is sent is also the one that is received."""
    began, trainer, exchanges = time.monotonic(), made.trainer, made.trainer.exchanges
    before = trainer.parameters.read()
    try:
        try:
            update = trainer.snapshot(0, 0, averaging=False)
        except PeerError as e:
            if e.reason != Reason.NOT_READY:  # a window's gradient is not complete
                raise
            update = trainer.snapshot(0, 0, averaging=True)
        sent = exchanges.compress(0, update)
        payload, parties = memoryview(sent.payload), 1
        if manifest.round.masks:
            parties = manifest.round.group
            payload = _sum(sent.form, payload, parties)
        others = range(1 if manifest.round.masks else manifest.round.least_group - 1)
        for other in others:
            exchanges.verify(0, other, PeerUpdate(payload, sent.form, peer_id="", parties=parties))
        exchanges.resolve(0, dict.fromkeys(others, 1 / (1 + len(others))))
        trainer.merge(0)
    except (PeerError, LocalError) as e:
        raise ConfigError(
            f"manifest round.codec = {manifest.round.codec}, round.rule = {manifest.round.rule}, "
            f"round.masks = {str(manifest.round.masks).lower()}: an exchange of these parameters "
            f"with themselves fails: {e}",
            "choose another codec, or another round.mask_step and round.mask_bits",
        ) from e
    pieces = zip(
        torch.split(before, _PIECE), torch.split(trainer.parameters.read(), _PIECE), strict=True
    )
    if exchanges.rule.is_plain and not all(torch.allclose(*two, atol=1e-6) for two in pieces):
        raise LocalError(
            "an exchange of the parameters with themselves changed them", "report this as a bug"
        )
    what = f"{sent.form.codec}, {payload.nbytes:,} bytes"
    report(f"one exchange with itself ({what}) ... {_since(began)}")
    exchanges.buffers.clear()  # there is no second exchange


def _sum(form: Form, payload: memoryview, parties: int) -> memoryview:
    """The sum of a masked group whose members all have the same values."""
    total = bytearray(payload)
    rings = fixedpoint.rings(form, total)
    for _ in range(parties - 1):
        fixedpoint.add_into(rings, fixedpoint.rings(form, payload))
    return memoryview(total)


def _saved(made: Assembled) -> _Trained:
    """Save a checkpoint, and note what its model computes."""
    began = time.monotonic()
    made.checkpoints.copy()()
    limit = min(model.vocab_size(made.model), 256)
    # no position after the last one is trained
    length = min(16, made.trainer.manifest.optimiser.sequence_tokens - 1)
    ids = torch.arange(2, 2 + length).remainder(limit).view(1, -1)
    device = next(made.model.parameters()).device
    return _Trained(made.tokenizer, device, ids, _logits(made.model, ids), began)


def _restart_and_export(
    trained: _Trained, manifest: Manifest, setup: TrainerSetup, folder: Path, report: Report
) -> None:
    """Check that a restart and an export load the model that was trained."""
    home = Home(Path(setup.home))
    bundle, warnings = checkpoint.load_latest(home.checkpoints)
    if bundle is None:
        raise LocalError(f"no checkpoint could be read back: {warnings}", "check the disk")
    with torch.no_grad():
        bundle = replace(bundle, consolidation=None)
        rebuilt = trained_model(manifest, home, setup.config.data.base_model, bundle)
        rebuilt.to(trained.device).eval()
        remedy = "correct config.json, or report this as a bug"
        _require_equal(trained.logits, _logits(rebuilt, trained.ids), "restarted", remedy)
        report(f"saved, and rebuilt from the manifest's config ... {_since(trained.began)}")
        began, target = time.monotonic(), folder / "export"
        folders = source_folders(home, setup.config.data)
        kept = Source(manifest.model.config, manifest.model.generation, folders)
        lora, text = manifest.model.lora, manifest.public_text.text
        if lora is None:
            model.export_hf(rebuilt, trained.tokenizer, target, source=kept, text=text)
        else:
            model.export_adapters(
                rebuilt, manifest.model, trained.tokenizer, target, source=kept, text=text
            )
    report(f"exported, and loaded again ... {_since(began)}")


@torch.no_grad()
def _logits(of: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits of (1, T) ids, (1, T, vocabulary) float32, CPU; the model's mode is kept."""
    training = of.training
    of.eval()
    device = next(of.parameters()).device
    logits: torch.Tensor = of(input_ids=ids.to(device), use_cache=False).logits
    of.train(training)
    return logits.float().cpu()


def _require_equal(one: torch.Tensor, two: torch.Tensor, what: str, remedy: str) -> None:
    """Check that a model gives the same logits as the trained one."""
    error = float((one - two).abs().max()) / max(float(one.abs().max()), 1e-6)
    if not error <= _CLOSE:
        raise LocalError(
            f"the model as {what} is not the one that was trained: its outputs differ by "
            f"{error:.1%}",
            remedy,
        )


@contextmanager
def _staged(near: Path) -> Iterator[Path]:
    try:
        folder = Path(tempfile.mkdtemp(prefix=".xpeer-trial-", dir=near))
    except OSError as e:
        raise LocalError(f"{near} can't be written: {e.strerror}", "check disk and rights") from e
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _count(number: int) -> str:
    if number < 10**6:
        return f"{number:,}"
    return f"{number / 1e6:.3g} M" if number < 10**9 else f"{number / 1e9:.3g} G"


def _since(began: float) -> str:
    return f"{time.monotonic() - began:.2g} s"
