"""The self-test of engines, at every start, on records of the shard.

Looking at a model's layers is not enough: layers that all seem fine can give a wrong gradient. So
engines are compared with plain autograd, in float32. An engine that computes smaller norms than
autograd would clip too little, and is never used.

In bfloat16 two right engines differ by percents: a batch of another size rounds otherwise. So there
the bounds are held against what rounds the same way:

- what a record adds to the sum: its norm is at most C, for each record within its batch. This is
  what privacy rests on, and no engine is exempt;
- the gradients that each layer's own autograd makes, in float32, of the very inputs and output
  gradients that the engine noted (`factor_check`; `BookKeepingEngine` alone notes them);
- plain autograd in bfloat16, within a coarse bound.

Memory is that of a step at most: as many sums as there are parameters for the engine and for its
factors, in place of a step's moments. What they are compared with waits on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

import torch
from torch import Tensor, nn

from xpeer.errors import ConfigError
from xpeer.privacy import blocks
from xpeer.privacy.clipping import (
    BookKeepingEngine,
    Bound,
    Clipped,
    Engine,
    FunctionalEngine,
    MicrobatchEngine,
    trainable,
)
from xpeer.privacy.factor_check import Factors
from xpeer.privacy.fitting import until_it_fits
from xpeer.privacy.steps import FULL, Precision, Switchable
from xpeer.shortage import out_of_memory

UNDERESTIMATE_MAX: Final = 1e-3
"""Largest relative amount by which an engine may underestimate a record's norm."""
SUM_ERROR_MAX: Final = 1e-4
"""Largest error of the sum of clipped gradients, relative to its norm."""
COARSE: Final = 0.25
"""Both, between passes that round differently in bfloat16."""
COUPLING_MAX: Final = 1e-3
"""Largest relative difference between a record's loss alone and its loss in a batch."""
ANY: Final = 1 << 30
"""So many records are more than any pass has."""
_SILENT: Final = 1e-6
"""Fraction of C to which the others of a batch are clipped, when one record's part is measured."""
_PAIR: Final = 2
"""Fewest records that can influence one another."""
_PART: Final = 1 << 24
"""Values that are compared at a time: their squares take 128 MiB in float64."""

Candidate = Callable[[], Engine]
_T = TypeVar("_T")


def _unchanged() -> str:
    return ""


@dataclass(frozen=True, slots=True)
class Bench:
    """What engines are tested on.

    Attributes:
        model: on its device. If all its values are float32, engines are compared in float32 first.
        losses: the loss that all candidates use.
        sample: (n, T) int64 records.
        relieve: see `Options.relieve`.
        most_records: records of the largest pass in training.
    """

    model: nn.Module
    losses: Switchable
    sample: Tensor
    relieve: Callable[[], str] = _unchanged
    most_records: int = ANY

    def zeros(self) -> list[Tensor]:
        """Sums of nothing."""
        return [torch.zeros_like(p) for p in trainable(self.model)]

    def fit(self, engine: Engine, work: Callable[[], _T]) -> _T:
        """Do an engine's work in less memory where it runs out, as a step would.

        Layers are not computed again for vmap's sake: it can't, and others need not.
        """
        relieve = _unchanged if isinstance(engine, FunctionalEngine) else self.relieve
        return until_it_fits(work, lambda: engine.shrink() or relieve())

    def clip(self, engine: Engine, clip_norm: Bound) -> tuple[Clipped, list[Tensor]]:
        """Clip the sample, and add up."""

        def clip_and_add_up() -> tuple[Clipped, list[Tensor]]:
            sums = self.zeros()
            return engine.accumulate(self.sample, clip_norm, sums), sums

        return self.fit(engine, clip_and_add_up)


@dataclass(frozen=True, slots=True)
class Refused:
    """An engine that is not used, and why."""

    why: str
    """With its name."""
    place: int
    """Its place among the candidates, which come in the order of preference."""
    for_memory: bool
    """Whether it ran out of memory. Next time there may be more."""

    @classmethod
    def because(cls, error: Exception, name: str, place: int) -> Refused:
        """The refusal of an engine that failed."""
        if out_of_memory(error):
            return cls(f"{name}: it ran out of memory", place, for_memory=True)
        return cls(f"{name}: {type(error).__name__}: {error}", place, for_memory=False)


_Numbered = Sequence[tuple[int, Candidate]]
"""Candidates with their places."""


def right_ones(
    bench: Bench, candidates: Sequence[Candidate], precision: Precision, only: str | None = None
) -> tuple[dict[Engine, int], list[Refused]]:
    """Engines that are right, with their places, and those that are refused.

    Plain autograd is the last of the engines. The model is in evaluation mode meanwhile. The loss
    has `precision` afterwards. With `only`, the candidate of that name alone is tested.

    Args:
        bench: model, loss and records.
        candidates: make the engines; one that is preferred comes before others.
        precision: of steps.
        only: name of an engine.

    Raises:
        ConfigError: records influence one another, or the loss is not finite.
        ShortOfMemoryError: not even plain autograd fits into memory.
    """
    model, losses = bench.model, bench.losses
    training = model.training
    model.eval()
    low = precision.name != FULL.name
    whole = all(p.dtype == torch.float32 for p in model.parameters())
    numbered: _Numbered = list(enumerate(candidates))
    right: dict[Engine, tuple[int, Candidate]] = {}
    refused: list[Refused] = []
    try:
        if whole:
            losses.precision = FULL
            right, refused = _agreeing(bench, numbered, only, coarse=False)
            numbered = list(right.values())
        losses.precision = precision
        if low or not whole:
            right, more = _agreeing(bench, numbered, only, coarse=True)
            refused += more
        places: dict[Engine, int] = {engine: place for engine, (place, _) in right.items()}
        places[MicrobatchEngine(model, losses)] = len(candidates)
        return places, refused
    finally:
        losses.precision = precision
        model.train(training)


def _agreeing(
    bench: Bench, candidates: _Numbered, only: str | None, *, coarse: bool
) -> tuple[dict[Engine, tuple[int, Candidate]], list[Refused]]:
    """Engines that are right, with what made them, and reasons against the others."""
    reference = MicrobatchEngine(bench.model, bench.losses)
    norms = bench.clip(reference, 1e30)[0].norms
    finite = norms[torch.isfinite(norms)]
    if not len(finite):
        raise ConfigError(
            f"the model's loss is not finite on any record tried, in {bench.losses.precision.name}",
            "check its initial parameters" if not coarse else "set training.precision to float32",
        )
    # half of the records, or more, are clipped
    clip_norm = max(0.5 * float(finite.median()), 1e-12)
    expected = _on_host(bench.clip(reference, clip_norm))
    _refuse_coupling(bench, None if coarse else expected[0])
    right: dict[Engine, tuple[int, Candidate]] = {}
    refused: list[Refused] = []
    for place, make in candidates if only != reference.name else ():
        kind = getattr(make, "func", make)
        name = getattr(kind, "name", getattr(kind, "__name__", "engine"))
        try:
            engine = make()
            name = engine.name
            if only not in (None, name):
                continue
            blocks.forget()
            problem = _problem(bench, engine, clip_norm, expected, coarse=coarse)
            most = bench.most_records
            if not problem and blocks.would_not_be_kept(most, bench.sample.device):
                with blocks.none_kept():  # as in training's larger passes
                    problem = _problem(bench, engine, clip_norm, expected, coarse=coarse)
        except Exception as e:  # noqa: BLE001 - after any failure the next engine may work
            refused.append(Refused.because(e, name, place))
            continue
        if problem:
            refused.append(Refused(f"{name}: {problem}", place, for_memory=False))
        else:
            right[engine] = place, make
        if only is not None:
            break
    return right, refused


def _on_host(found: tuple[Clipped, list[Tensor]]) -> tuple[Clipped, list[Tensor]]:
    """Sums on the CPU: they wait for each engine, which needs the device's memory for its own."""
    clipped, sums = found
    for i, total in enumerate(sums):
        sums[i] = total.cpu()
    return clipped, sums


def _problem(
    bench: Bench,
    engine: Engine,
    clip_norm: float,
    expected: tuple[Clipped, list[Tensor]],
    *,
    coarse: bool,
) -> str:
    """Why an engine is wrong; "" if it is right."""
    if not coarse:
        return _difference(expected, bench.clip(engine, clip_norm))
    # each of these frees its sums before the next one makes its own
    return _differs_coarsely(bench, engine, clip_norm, expected) or _too_much(
        bench, engine, clip_norm
    )


def _differs_coarsely(
    bench: Bench, engine: Engine, clip_norm: float, expected: tuple[Clipped, list[Tensor]]
) -> str:
    got, of_factors = _with_factors(bench, engine, clip_norm)
    problem = _difference(expected, got, COARSE, COARSE)
    if not problem and of_factors is not None:
        problem = _difference(of_factors, got)
    return problem


def _difference(
    expected: tuple[Clipped, list[Tensor]],
    got: tuple[Clipped, list[Tensor]],
    low_max: float = UNDERESTIMATE_MAX,
    error_max: float = SUM_ERROR_MAX,
) -> str:
    """What is wrong with norms and sums; "" if they are as expected."""
    norms, wanted = got[0].norms, expected[0].norms
    if norms.shape != wanted.shape:
        return "it does not tell one norm per record"
    low = _largest((wanted - norms).clamp(min=0), wanted)
    if not low <= low_max:
        return f"norms under-estimated by {low:.2g}"
    error = size = 0.0
    for a, b in zip(expected[1], got[1], strict=True):
        for one, two in zip(_in_parts(a), _in_parts(b), strict=True):
            wide = one.to(two.device).double()
            error += float((wide - two).square().sum())
            size += float(wide.square().sum())
    relative = (error / max(size, 1e-60)) ** 0.5
    if not relative <= error_max:
        return f"sum of clipped gradients wrong by {relative:.2g}"
    return ""


def _in_parts(values: Tensor) -> Sequence[Tensor]:
    return torch.split(values.flatten(), _PART)


def _too_much(bench: Bench, engine: Engine, clip_norm: float) -> str:
    """Whether a record adds more than C to the sum of its batch."""
    sample = bench.sample
    for i in range(len(sample)):
        bounds = torch.full((len(sample),), _SILENT * clip_norm, dtype=torch.float64)
        bounds[i] = clip_norm
        sums = bench.clip(engine, bounds.to(sample.device))[1]
        squares = [part.double().square().sum() for total in sums for part in _in_parts(total)]
        del sums
        norm = float(torch.stack(squares).sum().sqrt())
        over = norm / clip_norm - 1 - len(sample) * _SILENT
        if not over <= UNDERESTIMATE_MAX:
            return f"a record adds {over:.2g} more than the clipping norm to the sum"
    return ""


def _with_factors(
    bench: Bench, engine: Engine, clip_norm: float
) -> tuple[tuple[Clipped, list[Tensor]], tuple[Clipped, list[Tensor]] | None]:
    """What the engine finds; and what autograd makes of the factors that it noted, if any."""
    if not isinstance(engine, BookKeepingEngine):
        return bench.clip(engine, clip_norm), None

    def clip_and_watch() -> tuple[Clipped, list[Tensor], Factors]:
        engine.watch = None  # an attempt that failed left its sums
        factors, sums = Factors(trainable(bench.model), clip_norm), bench.zeros()
        if not engine.micro_batch:  # the first passes find out how many records later ones have
            engine.accumulate(bench.sample, clip_norm, sums)
        for watch in (factors.counting, factors.measuring):
            engine.watch = watch()
            engine.accumulate(bench.sample, clip_norm, sums)
        engine.watch = factors.adding()
        for total in sums:
            total.zero_()
        return engine.accumulate(bench.sample, clip_norm, sums), sums, factors

    try:
        clipped, sums, factors = bench.fit(engine, clip_and_watch)
    finally:
        engine.watch = None
    of_factors = Clipped(clipped.losses, clipped.tokens, torch.cat(factors.norms))
    return (clipped, sums), (of_factors, factors.sums)


def _refuse_coupling(bench: Bench, alone: Clipped | None) -> None:
    """Refuse a model in which records influence one another.

    Args:
        bench: its model is in evaluation mode.
        alone: losses of each record alone; None = compare with a batch of its copies instead, which
            rounds in the same way.
    """
    model, losses, size = bench.model, bench.losses, len(bench.sample)

    @torch.no_grad()
    def change() -> float:
        some = bench.sample[:size]
        in_batch, _ = losses(model, some)
        if alone is None:
            copies = [losses(model, x.expand_as(some))[0][i] for i, x in enumerate(some)]
            others = torch.stack(copies)
        else:
            others = alone.losses[:size]
        return _largest(in_batch - others, others)

    def fewer() -> str:
        nonlocal size
        if size == _PAIR:
            return bench.relieve()
        size = max(_PAIR, size // 2)
        return "fewer records"

    if (largest := until_it_fits(change, fewer)) > COUPLING_MAX:
        raise ConfigError(
            f"records influence one another in this model: their losses change by {largest:.1%} "
            "when they share a batch",
            "use another model, or privacy.mode off",
        )


def _largest(differences: Tensor, values: Tensor) -> float:
    """The largest difference relative to its value, where both are finite."""
    relative = differences.abs().double() / values.abs().double().clamp(min=1e-12)
    relative = relative[torch.isfinite(values) & torch.isfinite(differences)]
    return float(relative.max()) if len(relative) else 0.0
