"""The choice of an engine: the fastest that is right on records of the shard (`engine_check`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from xpeer.errors import ConfigError
from xpeer.privacy.clipping import (
    DEFAULT_MEMORY_BYTES,
    BookKeepingEngine,
    Engine,
    FunctionalEngine,
    RecordLosses,
    trainable,
)
from xpeer.privacy.engine_check import ANY, Bench, Candidate, Refused, right_ones
from xpeer.privacy.engine_memory import EngineMemory
from xpeer.privacy.steps import FULL, Precision, Records, Switchable

SAMPLE_RECORDS: Final = 4
_LOOK_AT: Final = 256
"""Records from which the sample is picked."""
_TIMED_RECORDS: Final = 8
_TRIED_RECORDS: Final = 2
"""An engine is given up if it needs longer for so many records than the best one for all."""
_PASSES: Final = 3
"""An engine is timed so often, and its fastest pass counts: a busy machine only slows."""
_ENOUGH_S: Final = 1.0
"""No further pass after one that took so long."""
_WORTH_IT: Final = 0.9
"""An engine replaces the best of those before it only if it needs less than this part of its
time."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The engine to use, and why."""

    engine: Engine
    reason: str
    """How fast the exact engines were, and why others were refused; in words for the operator."""
    refused: str = ""
    """Engines that are preferred to this one, and why the test refused them; empty = none."""


def choose_engine(
    model: nn.Module,
    record_losses: RecordLosses,
    sample: Tensor,
    *,
    micro_batch: int = 0,
    memory_bytes: int = DEFAULT_MEMORY_BYTES,
    candidates: Sequence[Candidate] | None = None,
    clock: Callable[[], float] | None = None,
    memory: EngineMemory | None = None,
    precision: Precision = FULL,
    relieve: Callable[[], str] = lambda: "",
    most_records: int = ANY,
) -> Choice:
    """Choose last time's engine if it is still right, else the fastest that is right.

    Args:
        model: on its device. It is in evaluation mode while engines are compared, since dropout is
            random; they are timed in the mode that it came in.
        record_losses: the loss.
        sample: (n, T) int64 records, some of them padded; see `sample_of`.
        micro_batch: records per pass; 0 = the engine chooses.
        memory_bytes: bound of what an engine keeps during a pass.
        candidates: engines to try; where speeds are alike, an earlier one is preferred.
            `MicrobatchEngine` always follows as the last. None = all others.
        clock: seconds, for the timing; None = see `_clock_of`.
        memory: the node's memory of the choice for this model, device and batch; None = none.
        precision: of steps. Engines are compared in float32 first, and timed in this. A
            `Switchable` loss keeps it.
        relieve: see `Options.relieve`. What it changes stays changed, since steps need it, too.
        most_records: records of the largest pass of a step; what only larger ones would do is not
            tested.

    Raises:
        ConfigError: records influence one another in this model, no parameter is trained, or the
            model can't compute in this precision.
        ShortOfMemoryError: a single record does not fit.
    """
    refuse_coupled(model)
    if not trainable(model):
        raise ConfigError("no parameter of the model is trained", "unfreeze some of them")
    losses = record_losses if isinstance(record_losses, Switchable) else Switchable(record_losses)
    options: dict[str, int] = {"micro_batch": micro_batch, "memory_bytes": memory_bytes}
    if candidates is None:
        kinds = BookKeepingEngine, FunctionalEngine
        candidates = [partial(kind, model, losses, **options) for kind in kinds]
    tested = Bench(model, losses, sample, relieve, most_records), candidates, precision
    known = memory.recall() if memory is not None else None
    if known is not None and (engine := _again(*tested, known[0])):
        return Choice(engine, *known[1:])
    right, refused = right_ones(*tested)
    engine, reason = _fastest(tested[0], right, clock or _clock_of(sample.device), refused)
    reason = "; ".join([reason, *(f"refused {each.why}" for each in refused)])
    preferred = [each for each in refused if each.place < right[engine]]
    why = "; ".join(each.why for each in preferred)
    if any(each.for_memory for each in preferred):
        return Choice(engine, f"{reason}; the next start tries again, with what memory it has", why)
    if memory is not None:
        memory.keep(engine.name, reason, why)
    return Choice(engine, reason, why)


def sample_of(records: Records) -> Tensor:
    """Pick a few records for the test: (n, T) -> (m, T), 2 <= m <= 4; n >= 1.

    The record with the most padding (negative numbers) is among them.
    """
    first = records[:_LOOK_AT]
    filled = (first < 0).sum(1)
    spread = torch.linspace(0, len(first) - 1, SAMPLE_RECORDS - 1).long()
    chosen = torch.tensor(sorted({int(filled.argmax()), *spread.tolist()}))
    return first[chosen] if len(chosen) > 1 else first[chosen].expand(2, -1)


def refuse_coupled(model: nn.Module) -> None:
    """Refuse layers through which one record of a batch reaches another.

    Raises:
        ConfigError: the model has such a layer. No clipping would bound a record's influence.
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


def _clock_of(device: torch.device) -> Callable[[], float]:
    """The seconds that one thread computes, where one does all: other processes, which may be busy
    at a start, don't count. Else those that pass.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time if alone else time.perf_counter


def _fastest(
    bench: Bench, right: dict[Engine, int], clock: Callable[[], float], refused: list[Refused]
) -> tuple[Engine, str]:
    """Time each engine by passes over a few records. The test before was the warm-up.

    The model is in the mode in which it will be trained. An engine that fails in it is added to
    `refused`; if it is the last one, its error is raised.

    Returns:
        The fastest engine, and why it was chosen.
    """
    engines, records = list(right), _repeated(bench.sample)
    sums = bench.zeros()
    best, best_s = engines[-1], float("inf")
    timings = []
    for engine in engines:
        began = clock()
        try:
            if best_s < float("inf"):
                _run(bench, engine, records[:_TRIED_RECORDS], sums)
                if (tried_s := clock() - began) > best_s:
                    timings.append(f"{engine.name} given up at {1e3 * tried_s:.3g} ms")
                    continue
            needed_s = min(_passes(bench, engine, records, sums, clock))
        except Exception as e:
            if engine is engines[-1]:
                raise
            refused.append(Refused.because(e, engine.name, right[engine]))
            continue
        timings.append(f"{engine.name} {1e3 * needed_s:.3g} ms")
        if best_s == float("inf") or needed_s < _WORTH_IT * best_s:
            best, best_s = engine, needed_s
    if len(timings) == 1:
        return best, "no other is exact for this model"
    return best, f"{_TIMED_RECORDS} records take {', '.join(timings)}"


def _passes(
    bench: Bench,
    engine: Engine,
    records: Tensor,
    sums: list[Tensor],
    clock: Callable[[], float],
) -> Iterator[float]:
    """The seconds of some passes."""
    for _ in range(_PASSES):
        began = clock()
        _run(bench, engine, records, sums)
        yield (took_s := clock() - began)
        if took_s > _ENOUGH_S:
            return


def _repeated(sample: Tensor) -> Tensor:
    return sample.repeat(-(-_TIMED_RECORDS // len(sample)), 1)[:_TIMED_RECORDS]


def _run(bench: Bench, engine: Engine, records: Tensor, sums: list[Tensor]) -> None:
    clipped = bench.fit(engine, lambda: engine.accumulate(records, 1.0, sums))
    float(clipped.norms.sum())  # waits for a GPU, too


def _again(
    bench: Bench, candidates: Sequence[Candidate], precision: Precision, name: str
) -> Engine | None:
    """The engine of this name. None unless it is right and works in training mode."""
    right, _ = right_ones(bench, candidates, precision, only=name)
    engine = next(iter(right))
    if engine.name != name:
        return None
    try:
        _run(bench, engine, bench.sample, bench.zeros())
    except Exception:  # noqa: BLE001 - after any failure all engines are tried
        return None
    return engine
