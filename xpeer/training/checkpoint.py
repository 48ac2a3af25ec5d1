"""Checkpoints: one atomic file with model, optimiser, counters, and the id of the ledger.

A checkpoint never holds the ledger's content: restoring one refunds no privacy. Nor does it hold
the state of the noise or sampling generators: partners could subtract noise that is used again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
import torch

from xpeer.errors import ConfigError, LocalError
from xpeer.leaves import Derived, Local, Noised, Parts, Public, Timing, Withheld, seen_by
from xpeer.mixing import received
from xpeer.training.checkpoint_files import name_of, paths, step_of
from xpeer.training.tensor_file import (
    CorruptFileError,
    OnProgress,
    Pages,
    clear_staging,
    map_tensors,
    write_tensors,
)

SCHEMA_VERSION: Final = 1
_TENSORS: Final = ("flat", "exp_avg", "exp_avg_sq")
_CONSOLIDATION: Final = "consolidation"
_RULE: Final = "rule."
_SEEN: Final = "seen"
_FROZEN: Final = "frozen"


@seen_by(
    "home",
    "export, rather than copy: counters hold tokens and seconds; moments follow from "
    "noised gradients, `seen` is empty under privacy",
)
@dataclass(frozen=True, slots=True)
class Bundle:
    """Everything that training needs to go on as if it had not stopped."""

    flat: Noised[torch.Tensor]  # (num_params,) float32, CPU
    exp_avg: Noised[torch.Tensor]  # (num_params,) float32, CPU: AdamW's first moment, in flat order
    exp_avg_sq: Noised[torch.Tensor]  # (num_params,) float32, CPU: its second
    optimiser_step: Timing[int]
    """AdamW's own step count, for its bias correction; 0 = the moments are fresh."""
    consolidation: Derived[torch.Tensor | None] = None  # (bytes,) uint8
    """What consolidation adds for an export (`received.packed_addition`); None = nothing."""
    rule: Derived[dict[str, torch.Tensor]] = field(default_factory=dict)
    """State of the aggregation rule, e.g. anchors and momentum, and of masked groups."""
    seen: Withheld[torch.Tensor] = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    """Names of the records that the present pass has used (`privacy.passes`)."""
    frozen: Public[torch.Tensor] = field(default_factory=lambda: torch.empty(0))
    """Frozen values (`frozen.values`), CPU; empty if the manifest freezes nothing."""
    counters: Parts[dict[str, Any]] = field(default_factory=dict)
    """`schedule.Counters` as builtins; the file is named after `step`."""
    ledger_id: Local[str] = ""
    manifest_hash: Public[str] = ""
    pages: Local[Pages | None] = None
    """Memory that the tensors of a loaded checkpoint lie in; None = it was not loaded."""

    def forget(self) -> None:
        """Give back the memory of what was read of a loaded checkpoint; it can be read again."""
        if self.pages is not None:
            self.pages.forget()

    @property
    def step(self) -> int:
        """Number of training steps so far."""
        return int(self.counters.get("step", 0))

    def consolidated(self) -> torch.Tensor:
        """Compute the parameters to export, (num_params,) float32."""
        if self.consolidation is None:
            return self.flat
        return received.unpacked(self.flat, self.consolidation)

    def require(self, manifest_hash: str, ledger_id: str, num_params: int) -> None:
        """Refuse a checkpoint of another swarm or model, or one that was charged to another ledger.

        Raises:
            LocalError: says what differs.
        """
        if self.manifest_hash != manifest_hash:
            raise ConfigError(
                f"the checkpoint of step {self.step} is of manifest {self.manifest_hash[:16]}, "
                f"this home's is {manifest_hash[:16]}",
                "restore the manifest, or move the checkpoints away",
            )
        if self.ledger_id != ledger_id:
            raise ConfigError(
                f"the checkpoint of step {self.step} was charged to ledger {self.ledger_id[:16]}, "
                f"this home's is {ledger_id[:16]}",
                "restore ledger.sqlite: a new ledger would spend the privacy of the shard twice",
            )
        if self.flat.numel() != num_params:
            raise LocalError(
                f"the checkpoint of step {self.step} has {self.flat.numel()} parameters, the model "
                f"{num_params}",
                "it was written by another version: move the checkpoints away",
            )


@seen_by("home")
class _Words(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The fields of a bundle that are not tensors."""

    schema_version: Public[int]
    optimiser_step: Timing[int]
    counters: Parts[dict[str, Any]]
    ledger_id: Local[str]
    manifest_hash: Public[str]


def save(
    folder: Path, bundle: Bundle, keep: int = 2, on_progress: OnProgress | None = None
) -> Path:
    """Write a checkpoint, then remove all but the newest.

    A crash at any byte leaves the previous checkpoint whole. Checkpoints of later steps are also
    removed: they belong to a state that was abandoned, and must not count as the newest.

    Args:
        folder: of the checkpoints, made if need be; one writer at a time.
        bundle: content of the checkpoint; must not change meanwhile.
        keep: number of checkpoints to keep, this one included.
        on_progress: called as for `write_tensors`.

    Raises:
        LocalError: the checkpoint can't be written; the older ones are untouched.
    """
    clear_staging(folder)
    words = _Words(
        schema_version=SCHEMA_VERSION,
        optimiser_step=bundle.optimiser_step,
        counters=bundle.counters,
        ledger_id=bundle.ledger_id,
        manifest_hash=bundle.manifest_hash,
    )
    path = folder / name_of(bundle.step)
    tensors = {name: getattr(bundle, name) for name in _TENSORS}
    if bundle.consolidation is not None:
        tensors[_CONSOLIDATION] = bundle.consolidation
    tensors[_SEEN] = bundle.seen
    if bundle.frozen.numel():
        tensors[_FROZEN] = bundle.frozen
    tensors |= {_RULE + name: value for name, value in bundle.rule.items()}
    text = msgspec.json.encode(words, order="sorted").decode()
    write_tensors(path, tensors, {"xpeer": text}, *([on_progress] if on_progress else []))
    older = [other for other in paths(folder) if step_of(other) < bundle.step]
    later = [other for other in paths(folder) if step_of(other) > bundle.step]
    for superfluous in [*later, *older[max(keep, 1) - 1 :]]:
        superfluous.unlink(missing_ok=True)
    return path


def load(path: Path) -> Bundle:
    """Verify all of one checkpoint, and map it: its tensors take memory only once they are read.

    Raises:
        CorruptFileError: the file is damaged; says how.
        LocalError: another version wrote it, in a format that this one can't read.
    """
    tensors, words, pages = map_tensors(path)
    try:
        parsed = msgspec.json.decode(words.get("xpeer", ""), type=_Words)
    except (msgspec.MsgspecError, ValueError, RecursionError) as e:
        raise CorruptFileError(f"its metadata can't be read: {e}") from e
    if parsed.schema_version != SCHEMA_VERSION:
        raise LocalError(
            f"checkpoint {path} has format {parsed.schema_version}, this version reads "
            f"{SCHEMA_VERSION}",
            "use the xpeer version that wrote it",
        )
    rule = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_RULE)}
    addition = tensors.pop(_CONSOLIDATION, None)
    seen = tensors.pop(_SEEN, None)
    frozen = tensors.pop(_FROZEN, None)
    shapes = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    if set(shapes) != set(_TENSORS) or len(set(shapes.values())) != 1:
        raise CorruptFileError(f"it holds {shapes}")
    return Bundle(
        **tensors,
        consolidation=addition,
        rule={name.removeprefix(_RULE): value for name, value in rule.items()},
        seen=torch.empty(0, dtype=torch.int64) if seen is None else seen,
        frozen=torch.empty(0) if frozen is None else frozen,
        optimiser_step=parsed.optimiser_step,
        counters=parsed.counters,
        ledger_id=parsed.ledger_id,
        manifest_hash=parsed.manifest_hash,
        pages=pages,
    )


def load_latest(folder: Path) -> tuple[Bundle | None, list[str]]:
    """Read the newest checkpoint that is whole.

    Returns:
        The checkpoint (None if there is none), and a warning for every newer one that is damaged.

    Raises:
        LocalError: all checkpoints are damaged. Training must not silently start afresh.
    """
    warnings: list[str] = []
    for path in paths(folder):
        try:
            return load(path), warnings
        except CorruptFileError as e:
            warnings.append(f"checkpoint {path} is damaged and was passed over: {e}")
    if warnings:
        raise LocalError(
            "; ".join(warnings),
            f"restore one from a backup, or empty {folder} to start afresh from a member's model",
        )
    return None, warnings


def read_moments(
    optimiser: torch.optim.Optimizer,
    parameters: Sequence[torch.nn.Parameter],
    out: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Copy AdamW's moments to two flat vectors, and return its step count, too.

    Args:
        optimiser: AdamW over exactly these parameters.
        parameters: in flat order.
        out: two vectors of (num_params,) float32, CPU, to write to.

    Returns:
        exp_avg and exp_avg_sq, (num_params,) float32 each, and the step count, 0 at the start.
    """
    (first, second), step, start = out, 0, 0
    for p in parameters:
        state, end = optimiser.state.get(p, {}), start + p.numel()
        if state:
            first[start:end].copy_(state["exp_avg"].detach().reshape(-1))
            second[start:end].copy_(state["exp_avg_sq"].detach().reshape(-1))
            step = max(step, int(state["step"]))
        else:
            first[start:end].zero_()
            second[start:end].zero_()
        start = end
    return first, second, step


def write_moments(
    optimiser: torch.optim.Optimizer,
    parameters: Sequence[torch.nn.Parameter],
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: int,
    copied: Callable[[], None] = lambda: None,
) -> None:
    """Put back what `read_moments` returned; the optimiser goes on as if it had not stopped.

    Args:
        optimiser: AdamW over exactly these parameters, one group.
        parameters: in flat order, on their device.
        exp_avg: (num_params,) float32.
        exp_avg_sq: (num_params,) float32.
        step: AdamW's step count; 0 = leave the optimiser fresh.
        copied: called after each of the two vectors was copied.

    Raises:
        LocalError: the vectors belong to another model.
    """
    sizes = [p.numel() for p in parameters]
    if exp_avg.numel() != sum(sizes) or exp_avg_sq.numel() != sum(sizes):
        raise LocalError(
            f"moments of {exp_avg.numel()} values do not fit {sum(sizes)} parameters",
            "they belong to another model",
        )
    if step == 0:
        return
    state = optimiser.state_dict()  # its param_groups number the parameters in their order
    state["state"] = {
        number: {
            "step": torch.tensor(float(step)),
            "exp_avg": torch.empty_like(p),
            "exp_avg_sq": torch.empty_like(p),
        }
        for number, p in enumerate(parameters)
    }
    optimiser.load_state_dict(state)
    with torch.no_grad():
        for name, vector in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
            for p, part in zip(parameters, torch.split(vector, sizes), strict=True):
                optimiser.state[p][name].copy_(part.view_as(p))
            copied()
