"""The choice of an engine: the fastest that agrees with plain autograd on records of the shard.

A look at a model's layers is not enough: a wrong gradient can come from layers that all seem fine.
So every engine is tried at start-up. One that finds smaller norms than autograd does would clip too
little, and is never used.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from xpeer.errors import ConfigError
from xpeer.privacy.clipping import (
    DEFAULT_MEMORY_BYTES,
    BookKeepingEngine,
    Clipped,
    Engine,
    FunctionalEngine,
    MicrobatchEngine,
    RecordLosses,
    trainable,
)
from xpeer.privacy.engine_memory import EngineMemory

UNDERESTIMATE_MAX: Final = 1e-3
"""Of a record's norm, relative."""
SUM_ERROR_MAX: Final = 1e-4
"""Of the sum of clipped gradients, relative to its norm."""
COUPLING_MAX: Final = 1e-3
"""Relative difference of a record's loss alone and among others."""
SAMPLE_RECORDS: Final = 4
_LOOK_AT: Final = 256
_TIMED_RECORDS: Final = 8
_TRIED_RECORDS: Final = 2
"""An engine that takes longer for these than the best for all is given up."""
_WORTH_IT: Final = 0.9
"""An engine that stands later in the order has to need less than this share of the time."""

Candidate = Callable[[], Engine]


@dataclass(frozen=True, slots=True)
class Choice:
    """An engine, and why it."""

    engine: Engine
    reason: str
    """In words for the operator: how fast the exact ones were, and why others were refused."""


def choose_engine(
    model: nn.Module,
    record_losses: RecordLosses,
    sample: Tensor,
    *,
    micro_batch: int = 0,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    candidates: Sequence[Candidate] | None = None,
    clock: Callable[[], float] = time.perf_counter,
    memory: EngineMemory | None = None,
) -> Choice:
    """The fastest engine that is right for this model; the one of last time, if it still is right.

    Args:
        model: on its device; put into evaluation mode for the comparison, for dropout is chance,
            but engines are timed in its own mode.
        record_losses: the loss.
        sample: (n, T) int64 records, some of them padded; see `sample_of`.
        micro_batch: records per pass; 0 = the engine chooses.
        memory_bytes: bound of what an engine keeps during a pass.
        candidates: in the order of preference where speeds are alike; one record at a time is
            always the last.
        clock: seconds, for the comparison.
        memory: of the node, for this model, device and batch.

    Raises:
        ConfigError: records influence one another in this model, or nothing of it is trained.
    """
    refuse_coupled(model)
    if not trainable(model):
        raise ConfigError("no parameter of the model is trained", "unfreeze some of them")
    options: dict[str, int] = {"micro_batch": micro_batch, "memory_bytes": memory_bytes}
    if candidates is None:
        candidates = [
            lambda: BookKeepingEngine(model, record_losses, **options),
            lambda: FunctionalEngine(model, record_losses, **options),
        ]
    known = memory.recall() if memory is not None else None
    if known is not None and (engine := _again(model, record_losses, sample, candidates, known[0])):
        return Choice(engine, known[1])
    right, refused = _right_ones(model, record_losses, sample, candidates)
    engine, reason = _fastest(model, right, sample, clock, refused)
    choice = Choice(engine, "; ".join([reason, *(f"refused {why}" for why in refused)]))
    if memory is not None:
        memory.keep(engine.name, choice.reason)
    return choice


def sample_of(records: Tensor) -> Tensor:
    """A few records for the test, the one with most places filled up (negative) among them:
    (n, T) -> (m, T), 2 <= m <= 4; n >= 1.
    """
    first = records[:_LOOK_AT]
    filled = (first < 0).sum(1)
    spread = torch.linspace(0, len(first) - 1, SAMPLE_RECORDS - 1).long()
    chosen = torch.tensor(sorted({int(filled.argmax()), *spread.tolist()}))
    return first[chosen] if len(chosen) > 1 else first[chosen].expand(2, -1)


def refuse_coupled(model: nn.Module) -> None:
    """Refuse layers through which one record of a batch reaches another.

    Raises:
        ConfigError: there is one: no clipping would bound a single record's influence.
    """
    for name, module in model.named_modules():
        owners: list[Any] = [module, getattr(module, "config", None)]
        capacity = any(
            getattr(owner, field, None)
            for owner in owners
            for field in ("expert_capacity", "capacity_factor", "moe_capacity_factor")
        )
        statistics = isinstance(module, _BatchNorm) or getattr(module, "track_running_stats", False)
        if statistics or capacity:
            why = "batch statistics" if statistics else "experts of limited capacity"
            raise ConfigError(
                f"model layer {name or type(module).__name__} has {why}: records would influence "
                "one another, and privacy per record can't be given",
                "use a model without it, or privacy.mode off",
            )


def _fastest(
    model: nn.Module,
    engines: Sequence[Engine],
    sample: Tensor,
    clock: Callable[[], float],
    refused: list[str],
) -> tuple[Engine, str]:
    """By one pass over a few records each; the test before was the warm-up.

    The last of them must work. Others that don't, in the mode in which the model will be trained,
    are added to `refused`.
    """
    records = _repeated(sample)
    sums = [torch.zeros_like(p) for p in trainable(model)]
    best, best_s = engines[-1], float("inf")
    told = []
    for engine in engines:
        began = clock()
        try:
            if best_s < float("inf"):
                _run(engine, records[:_TRIED_RECORDS], sums)
                if (tried_s := clock() - began) > best_s:
                    told.append(f"{engine.name} given up at {1e3 * tried_s:.3g} ms")
                    continue
                began = clock()
            _run(engine, records, sums)
        except Exception as e:
            if engine is engines[-1]:
                raise
            refused.append(f"{engine.name}: {type(e).__name__}: {e}")
            continue
        needed_s = clock() - began
        told.append(f"{engine.name} {1e3 * needed_s:.3g} ms")
        if best_s == float("inf") or needed_s < _WORTH_IT * best_s:
            best, best_s = engine, needed_s
    if len(told) == 1:
        return best, "no other is exact for this model"
    return best, f"{_TIMED_RECORDS} records take {', '.join(told)}"


def _repeated(sample: Tensor) -> Tensor:
    return sample.repeat(-(-_TIMED_RECORDS // len(sample)), 1)[:_TIMED_RECORDS]


def _run(engine: Engine, records: Tensor, sums: list[Tensor]) -> None:
    float(engine.accumulate(records, 1.0, sums).norms.sum())  # waits for a GPU, too


def _again(
    model: nn.Module,
    record_losses: RecordLosses,
    sample: Tensor,
    candidates: Sequence[Candidate],
    name: str,
) -> Engine | None:
    """The engine of this name, if it is right and works in training mode."""
    right, _ = _right_ones(model, record_losses, sample, candidates, only=name)
    if right[0].name != name:
        return None
    try:
        _run(right[0], sample, [torch.zeros_like(p) for p in trainable(model)])
    except Exception:  # noqa: BLE001 - whatever it is, all are tried then
        return None
    return right[0]


def _right_ones(
    model: nn.Module,
    record_losses: RecordLosses,
    sample: Tensor,
    candidates: Sequence[Candidate],
    only: str | None = None,
) -> tuple[list[Engine], list[str]]:
    """Engines that agree with plain autograd, which is the last; and why others do not.

    With `only` that one alone is run; candidates before it are made.
    """
    training = model.training
    model.eval()
    try:
        return _agreeing(model, record_losses, sample, candidates, only)
    finally:
        model.train(training)


def _agreeing(
    model: nn.Module,
    record_losses: RecordLosses,
    sample: Tensor,
    candidates: Sequence[Candidate],
    only: str | None,
) -> tuple[list[Engine], list[str]]:
    reference = MicrobatchEngine(model, record_losses)
    free, _ = _try(model, reference, sample, 1e30)
    finite = free.norms[torch.isfinite(free.norms)]
    if not len(finite):
        raise ConfigError(
            "the model's loss is not finite on any record tried", "check its initial parameters"
        )
    # half of the records, or more, are clipped
    clip_norm = max(0.5 * float(finite.median()), 1e-12)
    expected, sums = _try(model, reference, sample, clip_norm)
    _refuse_coupling(model, record_losses, sample, expected)
    right: list[Engine] = []
    refused: list[str] = []
    for make in candidates if only != reference.name else ():
        name = getattr(make, "__name__", "engine")
        try:
            engine = make()
            name = engine.name
            if only not in (None, name):
                continue
            told, got = _try(model, engine, sample, clip_norm)
        except Exception as e:  # noqa: BLE001 - whatever a model does to it, the next may work
            refused.append(f"{name}: {type(e).__name__}: {e}")
            continue
        problem = _problem(expected, sums, told, got)
        if problem:
            refused.append(f"{name}: {problem}")
        else:
            right.append(engine)
        if only is not None:
            break
    return [*right, reference], refused


def _try(
    model: nn.Module, engine: Engine, sample: Tensor, clip_norm: float
) -> tuple[Clipped, list[Tensor]]:
    sums = [torch.zeros_like(p) for p in trainable(model)]
    return engine.accumulate(sample, clip_norm, sums), sums


def _problem(
    expected: Clipped, sums: Sequence[Tensor], told: Clipped, got: Sequence[Tensor]
) -> str:
    if told.norms.shape != expected.norms.shape:
        return "it does not tell one norm per record"
    low = _largest((expected.norms - told.norms).clamp(min=0), expected.norms)
    if not low <= UNDERESTIMATE_MAX:
        return f"norms under-estimated by {low:.2g}"
    error = sum(float((a - b).double().square().sum()) for a, b in zip(sums, got, strict=True))
    size = sum(float(a.double().square().sum()) for a in sums)
    relative = (error / max(size, 1e-60)) ** 0.5
    if not relative <= SUM_ERROR_MAX:
        return f"sum of clipped gradients wrong by {relative:.2g}"
    return ""


def _refuse_coupling(
    model: nn.Module, record_losses: RecordLosses, sample: Tensor, alone: Clipped
) -> None:
    with torch.no_grad():
        together, _ = record_losses(model, sample)
    change = _largest(together - alone.losses, alone.losses)
    if change > COUPLING_MAX:
        raise ConfigError(
            f"records influence one another in this model: their losses change by {change:.1%} "
            "when they share a batch",
            "use another model, or privacy.mode off",
        )


def _largest(differences: Tensor, values: Tensor) -> float:
    """Largest relative difference where both are finite."""
    relative = differences.abs().double() / values.abs().double().clamp(min=1e-12)
    relative = relative[torch.isfinite(values) & torch.isfinite(differences)]
    return float(relative.max()) if len(relative) else 0.0
