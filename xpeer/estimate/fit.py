"""Whether this machine can hold a node of a swarm: its memory and its disk, before it trains.

What can never fit is a problem, and ends a first start. What does not fit now is a warning: other
processes may end, and a node's own old process may still be there. An estimate may be wrong, so it
is a problem only if much less than the estimate would still be too much.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch

from xpeer.amounts import size
from xpeer.config import Home, NodeConfig
from xpeer.errors import ConfigError, LocalError
from xpeer.estimate import phases, remedies, room
from xpeer.estimate.planned import LONG_S, smallest, step_of
from xpeer.estimate.remembered import Rehearsals
from xpeer.estimate.room import Room
from xpeer.estimate.step import FROZEN_BYTES, Step, StepMemory
from xpeer.estimate.token_bytes import bytes_of_tokens
from xpeer.manifest import Manifest
from xpeer.manifest.model import QUANTISED, BaseDtype
from xpeer.source import entries
from xpeer.training import checkpoint_files
from xpeer.training.converted import bytes_of
from xpeer.training.held import DTYPES
from xpeer.training.model import skeleton
from xpeer.training.quantised import num_quantisable
from xpeer.training.recompute import layers_of

SURE: Final = 0.9
"""Part of an estimate that is needed for sure: steps took within a tenth of their estimates."""
_EASILY: Final = 0.5
"""A start rehearses no step whose rough bound is below this part of the memory."""
_CLEARLY: Final = 0.02
"""The same where a person asks what a node needs."""
_ROUGH_VALUES: Final = 24
"""Values that a layer keeps of each token, in units of its width: more than any family does."""
_SPARE_BYTES: Final = 64_000_000
"""Room on the disk for ledger, history and logs."""
_SETTING: Final = "training.check_fit"
OVERRIDE: Final = f"to go on all the same: {_SETTING} = warn (XPEER_TRAINING_CHECK_FIT)"
DAMAGED: Final = OSError, ValueError, KeyError, TypeError, AttributeError, LocalError
"""What reading damaged weights raises."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters, and a rough bound of a step, from shapes alone."""

    num_trained: int
    num_frozen: int
    step: Step
    """As a trainer begins with it."""
    smallest: Step
    """As it may become."""
    rough: int
    """More bytes than the step needs, in all likelihood."""
    num_codes: int
    """Frozen parameters that are held as codes of 8 or 4 bits."""
    again: bool
    """Whether the model has layers that can be computed again."""

    @property
    def least(self) -> int:
        """Bytes that no step can do without: weights, moments and gradients."""
        return 16 * self.num_trained + self.frozen_bytes

    @property
    def frozen_bytes(self) -> int:
        """Bytes of the frozen weights, at least."""
        return self.mapped_bytes + self.code_bytes

    @property
    def code_bytes(self) -> int:
        """Bytes of those that are made on the host at every start, whatever the device is."""
        return int(FROZEN_BYTES[self.step.base_dtype] * self.num_codes)

    @property
    def mapped_bytes(self) -> int:
        """Bytes of those that may lie in their file's pages: codes are made at every start."""
        held: BaseDtype = "bfloat16" if self.num_codes else self.step.base_dtype
        return int(FROZEN_BYTES[held] * (self.num_frozen - self.num_codes))

    @property
    def bound(self) -> StepMemory:
        """The rough bound of the step."""
        weights, moments = 4 * self.num_trained + self.frozen_bytes, 8 * self.num_trained
        return StepMemory(
            num_trained=self.num_trained,
            num_frozen=self.num_frozen,
            weights=weights,
            moments=moments,
            working=self.rough - weights - moments,
            saved=int(FROZEN_BYTES["bfloat16"] * self.num_codes) - self.code_bytes,
        )

    def least_in_words(self, num_bytes: int) -> str:
        """Say that a step needs so many bytes at least."""
        return (
            f"{self.num_trained:,} trained and {self.num_frozen:,} frozen parameters need "
            f"{size(num_bytes)} for weights, moments and gradients alone"
        )


@dataclass
class Fit:
    """The outcome of all comparisons."""

    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    problems: list[ConfigError] = field(default_factory=list)
    """What can't fit, whatever else runs on the machine."""
    memory: StepMemory | None = None
    """Of the step that a trainer begins with; None = it can't be known."""
    rehearsed: bool = False
    """False: `memory` is a rough bound."""
    short: bool = False
    """Whether there is no room for freed memory that the C library would keep."""

    def be_short(self, *, on_host: bool = True) -> None:
        """Note that there is no such room; of a GPU's memory the C library keeps none."""
        if self.short or not on_host:
            return
        self.short = True
        self.notes.append("memory is short: it is given back once freed, and steps take longer")

    def require(self) -> None:
        """Refuse what can't fit.

        Raises:
            ConfigError: the first problem.
        """
        if self.problems:
            raise self.problems[0]


def sizes_of(manifest: Manifest, config: NodeConfig, device: torch.device) -> Sizes:
    """Count parameters; no values are loaded. Takes a moment.

    Raises:
        ConfigError: the model can't be built, or the device can't compute as the settings say.
    """
    model: Any = skeleton(manifest.model.config)
    settings, num_trained = config.training, manifest.model.num_params
    step = step_of(manifest, settings, device)
    whole = sum(p.numel() for p in model.parameters())
    num_frozen = whole if step.lora is not None else max(0, whole - num_trained)
    values = _ROUGH_VALUES * _size_in(model, "hidden_size", 4096)
    values *= _size_in(model, "num_hidden_layers", 64)
    values += 6 * _size_in(model, "vocab_size", 1 << 18)
    tokens = step.micro_batch * step.sequence_tokens
    num_codes = num_quantisable(model) if step.base_dtype in QUANTISED else 0
    again, least = bool(layers_of(model)), smallest(step, settings, model)
    held = Sizes(num_trained, num_frozen, step, least, 0, num_codes, again)
    return replace(held, rough=held.least + 4 * num_trained + 4 * values * tokens)


def _size_in(model: Any, name: str, otherwise: int) -> int:
    """A size in the model's config, which another family may have as a list, or not at all."""
    found = getattr(model.config.get_text_config(), name, None)
    return found if isinstance(found, int) and found > 0 else otherwise


def examine(
    manifest: Manifest,
    config: NodeConfig,
    home: Home,
    device: torch.device,
    rehearsals: Rehearsals,
    *,
    asked: bool = False,
    lends: bool = True,
    here: Callable[[torch.device], Room] = room.of_device,
) -> Fit:
    """Compare what a node needs with what this machine has.

    Args:
        manifest: of the swarm.
        config: of the node.
        home: of the node.
        device: to train on.
        rehearsals: of earlier starts.
        asked: whether a person asks, who wants an estimate even if there is plenty of memory.
        lends: whether joiners are given its model.
        here: says what memory a device has.

    Raises:
        ConfigError: see `sizes_of`.
    """
    fit = Fit()
    sizes = sizes_of(manifest, config, device)
    wire = phases.Wire.of(manifest)
    lent = phases.donor_bytes(sizes.num_trained, wire) if lends else 0
    try:
        _compare_step(fit, sizes, wire, device, here(device), rehearsals, lent, asked=asked)
    except LocalError:
        raise
    except Exception as e:  # noqa: BLE001 - a model that can't be rehearsed may train all the same
        why = f"{type(e).__name__}: {e}".partition("\n")[0]
        fit.warnings.append(f"the memory of a step can't be estimated for this model: {why}")
    if device.type == "cuda":
        read = sizes.mapped_bytes if _is_read_whole(manifest, config, home) else 0
        _compare_host(fit, sizes, wire, here(torch.device("cpu")), read, lent)
    _compare_disk(fit, manifest, config, home)
    return fit


def _compare_step(
    fit: Fit,
    sizes: Sizes,
    wire: phases.Wire,
    device: torch.device,
    here: Room,
    rehearsals: Rehearsals,
    lent: int,
    *,
    asked: bool,
) -> None:
    """Compare a step with the memory of its device."""
    on_host = device.type != "cuda"
    beside = phases.host_bytes(sizes.num_trained, wire.rule) if on_host else 0
    lent = lent if on_host else 0
    process = phases.PROCESS if on_host else 0
    yielding = sizes.mapped_bytes if on_host else 0  # pages of a file give way
    if sizes.least - yielding + process > here.most:
        what = sizes.least_in_words(sizes.least - yielding + process)
        fit.problems.append(too_large(what, here, remedies.none_helps(sizes.step)))
        fit.memory = sizes.bound
        fit.be_short(on_host=on_host)
        return
    there = min(here.most, here.free)
    plenty = sizes.rough if asked else sizes.rough + max(beside, lent)
    if plenty < (_CLEARLY if asked else _EASILY) * there:
        fit.memory = sizes.bound
        fit.notes.append(f"a step needs less than {size(sizes.rough + process)}")
        return
    began = time.monotonic()
    memory = fit.memory = rehearsals.of(sizes.step)
    fit.rehearsed = True
    if (took_s := time.monotonic() - began) > LONG_S:
        fit.notes.append(f"the memory of a step was rehearsed in {took_s:.0f} s")
    needed = memory.peak + process
    fit.notes.append(f"a step needs about {size(needed)}; {here.what}: {size(here.most)}")
    if memory.peak + max(beside, lent) + phases.slack(memory) > here.free:
        fit.be_short(on_host=on_host)
    if memory.peak + beside <= here.free:
        if memory.peak + lent > here.free:
            fit.warnings.append(tight(_joiners(memory.peak + lent), here, ""))
        return
    what = f"a step needs about {size(needed)}"
    if beside > process:
        what += f" ({size(memory.peak + beside)} while a checkpoint is written)"
    remedy = remedies.find(
        sizes.step, memory, there - beside, rehearsals.of, again=sizes.again, founding=False
    )
    words = remedy.words if remedy is not None else ""
    if SURE * needed - yielding <= here.most:
        fit.warnings.append(tight(what, here, f"set {words}" if words else ""))
        return
    smaller = rehearsals.of(sizes.smallest).peak + process
    if SURE * smaller - yielding <= here.most:
        fit.warnings.append(tight(what, here, f"set {words}" if words else ""))
        return
    said = f"a step of a single record needs about {size(smaller)}"
    helps = f"set {words}" if words else remedies.none_helps(sizes.step)
    fit.problems.append(too_large(said, here, helps))


def _compare_host(
    fit: Fit, sizes: Sizes, wire: phases.Wire, host: Room, read: int, lent: int
) -> None:
    """Compare what a trainer on a GPU takes on the host.

    Args:
        fit: gets the outcome.
        sizes: of the model.
        wire: decides what is kept and handed out.
        host: memory of the host.
        read: bytes of frozen weights that can't be pages of a file.
        lent: bytes while joiners are given the model.
    """
    frozen = sizes.code_bytes + read
    needed = phases.host_bytes(sizes.num_trained, wire.rule, frozen)
    what = f"a trainer needs about {size(needed)} on the host, with its copy of a checkpoint"
    if frozen > phases.PROCESS:
        what = f"a start needs about {size(needed)} on the host, {size(frozen)} for frozen weights"
    if SURE * needed > host.most:
        fit.problems.append(too_large(what, host, remedies.none_helps(sizes.step)))
    elif needed > host.free:
        fit.warnings.append(tight(what, host, ""))
    elif lent > host.free:
        fit.warnings.append(tight(_joiners(lent), host, ""))


def _joiners(needed: int) -> str:
    return f"a node needs about {size(needed)} on the host while joiners are given its model"


def _compare_disk(fit: Fit, manifest: Manifest, config: NodeConfig, home: Home) -> None:
    """Compare what a node writes with what is free. What it has written already is not needed."""
    trained, rule = manifest.model.num_params, manifest.round.policy
    saved = checkpoint_files.paths(home.checkpoints)
    each = phases.checkpoint_bytes(trained, rule)
    needed = max(1, config.checkpoint.keep + 1 - len(saved)) * each + _SPARE_BYTES
    if not saved and not home.initial_model.exists():  # they come from a member, into a file
        fetched = sum(_length(path) for path in home.joining.glob("*"))
        needed += max(0, manifest.state_form.num_bytes - fetched)
    needed += _converted(manifest, config, home)
    made = saved or home.tokens.exists()
    tokens = 0 if made else bytes_of_tokens(manifest, config, _length)
    try:
        here = room.disk(home.path)
    except OSError as e:
        fit.warnings.append(f"{home.path}: its disk can't be asked for free space: {e.strerror}")
        return
    what = (
        f"checkpoints{', tokens' if tokens else ''} and history need {size(needed + tokens)} in "
        f"{home.path}, {size(here.free)} are free"
    )
    remedy = "free space, set checkpoint.keep to less, or move the home to a larger disk"
    if needed + tokens <= here.free:
        return
    if saved or needed + tokens // 2 <= here.free:
        fit.warnings.append(f"{what} - {remedy}")
    else:
        fit.problems.append(ConfigError(what, f"{remedy}; {OVERRIDE}"))


def _converted(manifest: Manifest, config: NodeConfig, home: Home) -> int:
    """Bytes of a base model that every start converts on the disk."""
    folder = _base_folder(manifest, config, home)
    return 0 if folder is None else converted_bytes(folder, manifest.model.base_dtype)


def converted_bytes(folder: Path, held: BaseDtype) -> int:
    """Bytes that a base model takes on the disk where it is converted.

    Args:
        folder: of the model.
        held: the type that nodes hold it in.
    """
    try:
        return bytes_of(folder, DTYPES[held])
    except DAMAGED:
        return 0  # who loads it says what is wrong with it


def _is_read_whole(manifest: Manifest, config: NodeConfig, home: Home) -> bool:
    """Whether the base model is a pickle, whose values can't stay in the pages of a file."""
    folder = _base_folder(manifest, config, home)
    try:
        return folder is not None and not entries(folder)
    except DAMAGED:
        return False


def _base_folder(manifest: Manifest, config: NodeConfig, home: Home) -> Path | None:
    """Folder of the weights that adapters are trained for; None = there is none."""
    named = config.data.base_model
    folder = Path(named).expanduser() if named else home.initial_model
    return folder if manifest.model.lora is not None and folder.is_dir() else None


def _length(path: Path) -> int:
    """Bytes that a file takes on the disk; 0 = it is gone."""
    try:
        return 512 * path.stat().st_blocks
    except OSError:
        return 0


def too_large(what: str, here: Room, remedy: str) -> ConfigError:
    """The error for what can never fit."""
    return ConfigError(f"{what}, and {here.what} is {size(here.most)}", f"{remedy}; {OVERRIDE}")


def tight(what: str, here: Room, remedy: str) -> str:
    """The warning of what does not fit now."""
    said = f"{what}, and of {here.what} ({size(here.most)}) {size(here.free)} are free now"
    return f"{said} - {remedy}" if remedy else said
