"""What layers' own autograd makes of the factors that an engine noted, for its self-test.

In bfloat16 two right engines differ by percents. But of the very inputs and output gradients that
an engine noted, autograd makes the same gradients in float32, and these have to agree closely.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xpeer.privacy.blocks import BlockedCall
from xpeer.privacy.clipping import clip_factors
from xpeer.privacy.layers import Call, in_full
from xpeer.privacy.record_gradients import squared_norms


class Factors:
    """Clipped sums of the gradients that layers' own autograd makes of noted factors, in float32.

    A record's gradient is made of one parameter at a time, and twice: for its norm, and for the
    sum. A whole one would be as large as all parameters.

    Attributes:
        norms: of the records so far, (1,) float64 each.
        sums: of their clipped gradients, as in `Engine.accumulate`.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], clip_norm: float) -> None:
        self.norms: list[Tensor] = []
        self.sums = [torch.zeros_like(p) for p in parameters]
        self._parameters = parameters
        self._clip_norm = clip_norm

    def __call__(self, calls: Sequence[Call | BlockedCall], batch: int) -> None:
        """Take a pass's calls: see `BookKeepingEngine.on_calls`."""
        of: dict[int, list[Call | BlockedCall]] = {id(p): [] for p in self._parameters}
        for call in calls:
            for parameter in call.module.parameters(recurse=False):
                if id(parameter) in of:
                    of[id(parameter)].append(call)
        for record in range(batch):
            squares = [
                squared_norms(_gradient(p, of[id(p)], record).flatten()[None])
                for p in self._parameters
            ]
            norm = torch.stack(squares).sum(0).sqrt()
            factor = float(clip_factors(norm, self._clip_norm))
            self.norms.append(norm)
            for total, parameter in zip(self.sums, self._parameters, strict=True):
                total.add_(_gradient(parameter, of[id(parameter)], record), alpha=factor)


def _gradient(parameter: nn.Parameter, calls: Sequence[Call | BlockedCall], record: int) -> Tensor:
    """One record's gradient by a parameter, from the calls of the layers that have it."""
    total = torch.zeros_like(parameter)
    for call in calls:
        for of, gradient in _of_record(call, record):
            if of is parameter:
                total += gradient
    return total


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
