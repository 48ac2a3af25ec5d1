"""The self-test of engines, at every start, on records of the shard.

Looking at a model's layers is not enough: layers that all seem fine can give a wrong gradient. So
engines are compared with plain autograd, in float32. An engine that computes smaller norms than
autograd would clip too little, and is never used.

In bfloat16 two right engines differ by percents: a batch of another size rounds otherwise. So there
the bounds are held against what rounds the same way:

- what a record adds to the sum: its norm is at most C, for each record within its batch. This is
  what privacy rests on, and no engine is exempt;
- the gradients that each layer's own autograd makes, in float32, of the very inputs and output
  gradients that the engine noted (`BookKeepingEngine` alone notes them);
- plain autograd in bfloat16, within a coarse bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from xpeer.errors import ConfigError
from xpeer.privacy.blocks import BlockedCall
from xpeer.privacy.clipping import (
    BookKeepingEngine,
    Bound,
    Clipped,
    Engine,
    MicrobatchEngine,
    clip_factors,
    trainable,
)
from xpeer.privacy.fitting import until_it_fits
from xpeer.privacy.layers import Call, in_full
from xpeer.privacy.record_gradients import squared_norms
from xpeer.privacy.steps import FULL, Precision, Switchable

UNDERESTIMATE_MAX: Final = 1e-3
"""Largest relative amount by which an engine may underestimate a record's norm."""
SUM_ERROR_MAX: Final = 1e-4
"""Largest error of the sum of clipped gradients, relative to its norm."""
COARSE: Final = 0.25
"""Both, between passes that round differently in bfloat16."""
COUPLING_MAX: Final = 1e-3
"""Largest relative difference between a record's loss alone and its loss in a batch."""
_SILENT: Final = 1e-6
"""Fraction of C to which the others of a batch are clipped, when one record's part is measured."""

Candidate = Callable[[], Engine]


def right_ones(
    model: nn.Module,
    losses: Switchable,
    sample: Tensor,
    candidates: Sequence[Candidate],
    precision: Precision,
    only: str | None = None,
) -> tuple[list[Engine], list[str]]:
    """Engines that are right, and reasons against the others.

    Plain autograd is the last of the engines. The model is in evaluation mode meanwhile. `losses`
    has `precision` afterwards. With `only`, the candidate of that name alone is tested.

    Args:
        model: on its device. If all its values are float32, engines are compared in float32 first.
        losses: the loss that all candidates use.
        sample: (n, T) int64 records.
        candidates: make the engines.
        precision: of steps.
        only: name of an engine.

    Raises:
        ConfigError: records influence one another, or the loss is not finite.
    """
    training = model.training
    model.eval()
    low = precision.name != FULL.name
    whole = all(p.dtype == torch.float32 for p in model.parameters())
    right: dict[Engine, Candidate] = {}
    refused: list[str] = []
    try:
        if whole:
            losses.precision = FULL
            right, refused = _agreeing(model, losses, sample, candidates, only, coarse=False)
            candidates = list(right.values())
        losses.precision = precision
        if low or not whole:
            right, more = _agreeing(model, losses, sample, candidates, only, coarse=True)
            refused += more
        return [*right, MicrobatchEngine(model, losses)], refused
    finally:
        losses.precision = precision
        model.train(training)


def _agreeing(
    model: nn.Module,
    losses: Switchable,
    sample: Tensor,
    candidates: Sequence[Candidate],
    only: str | None,
    *,
    coarse: bool,
) -> tuple[dict[Engine, Candidate], list[str]]:
    """Engines that are right, with what made them, and reasons against the others."""
    reference = MicrobatchEngine(model, losses)
    free, _ = _try(model, reference, sample, 1e30)
    finite = free.norms[torch.isfinite(free.norms)]
    if not len(finite):
        raise ConfigError(
            f"the model's loss is not finite on any record tried, in {losses.precision.name}",
            "check its initial parameters" if not coarse else "set training.precision to float32",
        )
    # half of the records, or more, are clipped
    clip_norm = max(0.5 * float(finite.median()), 1e-12)
    expected, sums = _try(model, reference, sample, clip_norm)
    _refuse_coupling(model, losses, sample, None if coarse else expected)
    right: dict[Engine, Candidate] = {}
    refused: list[str] = []
    for make in candidates if only != reference.name else ():
        name = getattr(make, "__name__", "engine")
        try:
            engine = make()
            name = engine.name
            if only not in (None, name):
                continue
            problem = _problem(model, engine, sample, clip_norm, (expected, sums), coarse=coarse)
        except Exception as e:  # noqa: BLE001 - after any failure the next engine may work
            refused.append(f"{name}: {type(e).__name__}: {e}")
            continue
        if problem:
            refused.append(f"{name}: {problem}")
        else:
            right[engine] = make
        if only is not None:
            break
    return right, refused


def _try(
    model: nn.Module, engine: Engine, sample: Tensor, clip_norm: Bound
) -> tuple[Clipped, list[Tensor]]:

    def clip_and_add_up() -> tuple[Clipped, list[Tensor]]:
        sums = [torch.zeros_like(p) for p in trainable(model)]
        return engine.accumulate(sample, clip_norm, sums), sums

    return until_it_fits(clip_and_add_up, engine.shrink)


def _problem(
    model: nn.Module,
    engine: Engine,
    sample: Tensor,
    clip_norm: float,
    expected: tuple[Clipped, list[Tensor]],
    *,
    coarse: bool,
) -> str:
    """Why an engine is wrong; "" if it is right."""
    if not coarse:
        return _difference(expected, _try(model, engine, sample, clip_norm))
    got, of_factors = _with_factors(model, engine, sample, clip_norm)
    problem = _difference(expected, got, COARSE, COARSE)
    if not problem and of_factors is not None:
        problem = _difference(of_factors, got)
    return problem or _too_much(model, engine, sample, clip_norm)


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
    pairs = list(zip(expected[1], got[1], strict=True))
    error = sum(float((a - b).double().square().sum()) for a, b in pairs)
    size = sum(float(a.double().square().sum()) for a, _ in pairs)
    relative = (error / max(size, 1e-60)) ** 0.5
    if not relative <= error_max:
        return f"sum of clipped gradients wrong by {relative:.2g}"
    return ""


def _too_much(model: nn.Module, engine: Engine, sample: Tensor, clip_norm: float) -> str:
    """Whether a record adds more than C to the sum of its batch."""
    for i in range(len(sample)):
        bounds = torch.full((len(sample),), _SILENT * clip_norm, dtype=torch.float64)
        bounds[i] = clip_norm
        _, sums = _try(model, engine, sample, bounds.to(sample.device))
        parts = [squared_norms(total.flatten()[None]) for total in sums]
        norm = float(torch.stack(parts).sum().sqrt())
        over = norm / clip_norm - 1 - len(sample) * _SILENT
        if not over <= UNDERESTIMATE_MAX:
            return f"a record adds {over:.2g} more than the clipping norm to the sum"
    return ""


def _with_factors(
    model: nn.Module, engine: Engine, sample: Tensor, clip_norm: float
) -> tuple[tuple[Clipped, list[Tensor]], tuple[Clipped, list[Tensor]] | None]:
    """What the engine finds; and what autograd makes of the factors that it noted, if any."""
    if not isinstance(engine, BookKeepingEngine):
        return _try(model, engine, sample, clip_norm), None
    watch = _Factors(trainable(model), clip_norm)
    engine.on_calls = watch
    try:
        clipped, sums = _try(model, engine, sample, clip_norm)
    finally:
        engine.on_calls = None
    of_factors = Clipped(clipped.losses, clipped.tokens, torch.cat(watch.norms))
    return (clipped, sums), (of_factors, watch.sums)


class _Factors:
    """Clipped sums of the gradients that layers' own autograd makes of noted factors, in float32.

    Attributes:
        norms: of the records so far, (1,) float64 each.
        sums: of their clipped gradients, as in `Engine.accumulate`.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], clip_norm: float) -> None:
        self.norms: list[Tensor] = []
        self.sums = [torch.zeros_like(p) for p in parameters]
        self._places = {id(p): i for i, p in enumerate(parameters)}
        self._clip_norm = clip_norm

    def __call__(self, calls: Sequence[Call | BlockedCall], batch: int) -> None:
        """Take a pass's calls: see `BookKeepingEngine.on_calls`."""
        for record in range(batch):
            gradients = [torch.zeros_like(x) for x in self.sums]
            for call in calls:
                for parameter, gradient in _of_record(call, record):
                    gradients[self._places[id(parameter)]] += gradient
            squares = [squared_norms(g.flatten()[None]) for g in gradients]
            norm = torch.stack(squares).sum(0).sqrt()
            factor = clip_factors(norm, self._clip_norm).float()
            self.norms.append(norm)
            for total, gradient in zip(self.sums, gradients, strict=True):
                total.add_(factor * gradient)


def _of_record(call: Call | BlockedCall, record: int) -> list[tuple[nn.Parameter, Tensor]]:
    """One record's gradients by a layer's own parameters, from one call of it."""
    if isinstance(call, BlockedCall):
        return _of_blocks(call, record)
    call = in_full(call)
    module, grad = call.module, call.grad
    own = {n: p for n, p in module.named_parameters(recurse=False) if p.requires_grad}
    values = {n: p.detach().float().requires_grad_() for n, p in own.items()}
    inputs = tuple(x[record : record + 1] if isinstance(x, Tensor) else x for x in call.inputs)
    with torch.enable_grad():
        out: Any = torch.func.functional_call(module, values, inputs, call.keywords)
        found = torch.autograd.grad(out, list(values.values()), grad[record : record + 1])
    return list(zip(own.values(), found, strict=True))


def _of_blocks(call: BlockedCall, record: int) -> list[tuple[nn.Parameter, Tensor]]:
    """The same for a layer whose output is never there as a whole."""
    own = {n: p for n, p in call.module.named_parameters(recurse=False) if p.requires_grad}
    made = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in own.items()}
    inputs = call.factors.cols[record].float()
    for start, stop in call.factors.parts():
        grad = call.factors.rows(start, stop)[record].float()
        values: dict[str, Any] = {
            name: p.detach()[start:stop].float().requires_grad_()
            for name, p in call.module.named_parameters(recurse=False)
        }
        with torch.enable_grad():
            out = nn.functional.linear(inputs, values["weight"], values.get("bias"))
            found = torch.autograd.grad(out, [values[name] for name in own], grad)
        for name, gradient in zip(own, found, strict=True):
            made[name][start:stop] = gradient
    return [(own[name], gradient) for name, gradient in made.items()]


def _refuse_coupling(
    model: nn.Module, losses: Switchable, sample: Tensor, alone: Clipped | None
) -> None:
    """Refuse a model in which records influence one another.

    Args:
        model: in evaluation mode.
        losses: the loss.
        sample: (n, T) int64 records.
        alone: losses of each record alone; None = compare with a batch of its copies instead, which
            rounds in the same way.
    """
    with torch.no_grad():
        in_batch, _ = losses(model, sample)
        if alone is None:
            copies = [losses(model, x.expand_as(sample))[0][i] for i, x in enumerate(sample)]
            others = torch.stack(copies)
        else:
            others = alone.losses
    change = _largest(in_batch - others, others)
    if change > COUPLING_MAX:
        raise ConfigError(
            f"records influence one another in this model: their losses change by {change:.1%} "
            "when they share a batch",
            "use another model, or privacy.mode off",
        )


def _largest(differences: Tensor, values: Tensor) -> float:
    """The largest difference relative to its value, where both are finite."""
    relative = differences.abs().double() / values.abs().double().clamp(min=1e-12)
    relative = relative[torch.isfinite(values) & torch.isfinite(differences)]
    return float(relative.max()) if len(relative) else 0.0
