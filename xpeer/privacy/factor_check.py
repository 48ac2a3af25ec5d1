"""What layers' own autograd makes of the factors that an engine noted, for its self-test.

In bfloat16 two right engines differ by percents. But of the very inputs and output gradients that
an engine noted, autograd makes the same gradients in float32, and these have to agree closely.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from xpeer.privacy.blocks import BlockedCall
from xpeer.privacy.clipping import CallWatch, clip_factors
from xpeer.privacy.layers import Call, in_full
from xpeer.privacy.record_gradients import squared_norms


class Factors:
    """Clipped sums of the gradients that layers' own autograd makes of noted factors, in float32.

    Each call of a layer is used when the backward pass makes it, and dropped: all calls of a pass
    would take more than a step does in which layers are computed again. So three passes over the
    same records are watched. The first counts the calls that each parameter has part in; a call
    waits for others of the same parameter only. The second measures norms, the third adds up.

    A record's gradient is made of one parameter at a time. A whole one would be as large as all
    parameters.

    Attributes:
        norms: of the records so far, (B,) float64 of each pass.
        sums: of their clipped gradients, as in `Engine.accumulate`.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], clip_norm: float) -> None:
        self.norms: list[Tensor] = []
        self.sums = [torch.zeros_like(p) for p in parameters]
        self._sum_of = {id(p): total for p, total in zip(parameters, self.sums, strict=True)}
        self._clip_norm = clip_norm
        self._counts: list[Counter[int]] = []

    def counting(self) -> CallWatch:
        """Watches the first pass."""
        return _Counting(self._counts, self._sum_of.keys())

    def measuring(self) -> CallWatch:
        """Watches the second."""
        squares: list[Tensor] = []

        def use(parameter: nn.Parameter, calls: Sequence[Call | BlockedCall], batch: int) -> None:
            each = [
                squared_norms(_gradient(parameter, calls, record).flatten()[None])
                for record in range(batch)
            ]
            squares.append(torch.cat(each))

        def end() -> None:
            self.norms.append(torch.stack(squares).sum(0).sqrt())
            squares.clear()

        return _Gathering(self._counts, self._sum_of.keys(), use, end)

    def adding(self) -> CallWatch:
        """Watches the third."""
        factors = [clip_factors(norms, self._clip_norm).tolist() for norms in self.norms]

        def use(parameter: nn.Parameter, calls: Sequence[Call | BlockedCall], batch: int) -> None:
            total = self._sum_of[id(parameter)]
            for record in range(batch):
                total.add_(_gradient(parameter, calls, record), alpha=factors[0][record])

        return _Gathering(self._counts, self._sum_of.keys(), use, lambda: factors.pop(0))


class _Counting:
    """Counts the calls that each parameter has part in, pass by pass."""

    def __init__(self, counts: list[Counter[int]], known: Collection[int]) -> None:
        self._counts, self._known = counts, known
        self._now: Counter[int] = Counter()

    def take(self, call: Call | BlockedCall, _batch: int) -> None:
        """See `CallWatch`."""
        self._now.update(id(p) for p in _own(call, self._known))

    def end(self) -> None:
        """See `CallWatch`."""
        self._counts.append(self._now)
        self._now = Counter()


class _Gathering:
    """Hands on a parameter with its calls once the last of them is there."""

    def __init__(
        self,
        counts: list[Counter[int]],
        known: Collection[int],
        use: Callable[[nn.Parameter, Sequence[Call | BlockedCall], int], None],
        end: Callable[[], object],
    ) -> None:
        self._counts, self._known = deque(counts), known
        self._use, self._end = use, end
        self._waiting: defaultdict[int, list[Call | BlockedCall]] = defaultdict(list)
        self._seen: Counter[int] = Counter()

    def take(self, call: Call | BlockedCall, batch: int) -> None:
        """See `CallWatch`."""
        for parameter in _own(call, self._known):
            self._seen[id(parameter)] += 1
            calls = self._waiting[id(parameter)]
            calls.append(call)
            if len(calls) == self._counts[0][id(parameter)]:
                del self._waiting[id(parameter)]
                self._use(parameter, calls, batch)

    def end(self) -> None:
        """See `CallWatch`."""
        if self._waiting or self._seen != self._counts[0]:
            raise RuntimeError("two passes over the same records called other layers")
        self._counts.popleft()
        self._seen.clear()
        self._end()


def _own(call: Call | BlockedCall, known: Collection[int]) -> list[nn.Parameter]:
    """The trained parameters of a call's layer."""
    return [p for p in call.module.parameters(recurse=False) if id(p) in known]


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
    one = slice(record, record + 1)
    inputs = tuple(x[one] if isinstance(x, Tensor) else x for x in call.inputs)
    call = in_full(Call(call.module, inputs, call.keywords, call.grad[one]))
    module = call.module
    own = {n: p for n, p in module.named_parameters(recurse=False) if p.requires_grad}
    values = {n: p.detach().float().requires_grad_() for n, p in own.items()}
    with torch.enable_grad():
        out: Any = torch.func.functional_call(module, values, call.inputs, call.keywords)
        found = torch.autograd.grad(out, list(values.values()), call.grad)
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
