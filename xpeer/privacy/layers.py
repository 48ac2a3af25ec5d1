"""Gradients of single records out of one backward pass over many.

Where a layer applies a weight matrix, the gradient of one record is a sum over its tokens of outer
products, sum_t u_t v_t^T. One factor is the layer's input, the other the gradient of its output.
`Outer` keeps the factors. Norms, inner products and weighted sums follow from them without writing
the matrices down (Goodfellow 2015, arXiv:1510.01799; Li et al. 2022, arXiv:2110.05679, section 4;
Bu et al. 2023, arXiv:2210.00038, "book-keeping"). Gradients of other parameters, which are small,
are written down.

Exact for layers that treat the records of a batch separately, with the batch as first dimension.
`engines.choose_engine` tests each model for that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from xpeer.errors import ConfigError
from xpeer.privacy.blocks import Blocked, BlockedCall
from xpeer.privacy.products import bmm


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a layer: its inputs, and the gradient of the loss by its output."""

    module: nn.Module
    inputs: tuple[Any, ...]
    keywords: dict[str, Any]
    grad: Tensor  # (B, ..., features_out)


OnCall = Callable[[Call | BlockedCall], None]


@dataclass(frozen=True, slots=True)
class Watch:
    """Who wants to know of a layer's calls. Code that computes without calling it says so here."""

    probe: Tensor
    """() float32; what is computed has to depend on it, see `tapped`."""
    on_call: OnCall
    """To be called in the backward pass."""


_watches: Final[dict[nn.Module, Watch]] = {}


def watch_of(module: nn.Module) -> Watch | None:
    """Who watches this layer at the moment; None = nobody, and nothing has to be handed over."""
    return _watches.get(module)


@dataclass(frozen=True, slots=True)
class _Noted:
    """What a tap keeps of a call until the backward pass reaches it, but for the tensors."""

    module: nn.Module
    others: tuple[Any, ...]
    """Its inputs, None in the place of each tensor."""
    keywords: dict[str, Any]
    on_call: OnCall

    def hand_over(self, tensors: tuple[Tensor, ...], grad: Tensor) -> None:
        """Pass the call on."""
        left = iter(tensors)
        inputs = tuple(next(left) if x is _TENSOR else x for x in self.others)
        self.on_call(Call(self.module, inputs, self.keywords, grad))


_TENSOR: Final = object()
"""Stands in the place of a tensor."""


class _Tap(torch.autograd.Function):
    """The identity. Its backward pass hands over the layer's inputs and the gradient that arrives.

    The backward pass is asked for the gradient by `probe` alone. So it reaches every tap, but does
    not compute the ordinary gradient of any weight. That saves a third of the work.

    Inputs are kept as autograd keeps its own. Where a part of the model is computed again during
    the backward pass (activation checkpointing), they are not kept either, and those computed again
    come in their place. The taps of the second computation are in no graph, and hand over nothing.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, probe: Tensor, noted: _Noted, *inputs: Tensor) -> Tensor:
        ctx.noted = noted
        ctx.save_for_backward(*inputs)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        ctx.noted.hand_over(tensors, grads[0])
        return grads[0], *[None] * (2 + len(tensors))


@contextmanager
def tapped(modules: list[nn.Module], probe: Tensor, on_call: OnCall) -> Iterator[None]:
    """Hand over every call of these modules, when the backward pass within the block reaches it.

    Args:
        modules: modules with parameters of their own.
        probe: () float32 that requires a gradient; `torch.autograd.grad(loss, probe)` makes the
            calls known.
        on_call: gets them, the last one first. A call whose output does not enter the loss never
            comes.
    """
    handing_over = False

    def hand_over(call: Call | BlockedCall) -> None:
        nonlocal handing_over
        handing_over = True
        try:
            on_call(call)
        finally:
            handing_over = False

    def hook(
        module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Any
    ) -> Tensor | None:
        if handing_over:  # whoever gets a call may run the layer again
            return None
        if not isinstance(output, Tensor):
            raise ConfigError(f"{type(module).__name__} returns more than a tensor")
        tensors = [x.detach() for x in inputs if isinstance(x, Tensor)]
        others = tuple(_TENSOR if isinstance(x, Tensor) else x for x in inputs)
        noted = _Noted(module, others, keywords, hand_over)
        tap: Any = _Tap.apply
        watched: Tensor = tap(output, probe, noted, *tensors)
        return watched

    handles = [m.register_forward_hook(hook, with_kwargs=True) for m in modules]
    handles += [m.register_forward_pre_hook(_as_it_computes) for m in modules if _multiplies(m)]
    _watches.update({m: Watch(probe, hand_over) for m in modules})
    try:
        yield
    finally:
        for module in modules:
            del _watches[module]
        for handle in handles:
            handle.remove()


def _multiplies(module: nn.Module) -> bool:
    """Whether it multiplies its input by a weight matrix."""
    is_conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")  # transformers' GPT-2
    return type(module) is nn.Linear or is_conv1d


def _as_it_computes(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Convert the input as autocast would. So what is noted is what the layer multiplied, and
    autograd keeps the same tensor.
    """
    first = inputs[0] if inputs else None
    if not isinstance(first, Tensor) or not torch.is_autocast_enabled(first.device.type):
        return inputs
    return first.to(torch.get_autocast_dtype(first.device.type)), *inputs[1:]


@dataclass(frozen=True, slots=True)
class Outer:
    """Gradients of B records as sums over T tokens of outer products.

    `rows` are vectors (B, T, p), or token numbers (B, T) int64 that stand for one-hot vectors.
    Vectors keep the precision in which the layer computed. All that is made of them is float32.
    """

    rows: Tensor
    cols: Tensor  # (B, T, d)

    @property
    def sparse(self) -> bool:
        """Whether rows are token numbers."""
        return self.rows.dim() == 2

    def add_block(self, start: int, stop: int, out: Tensor) -> None:
        """Add rows of the gradients to `out`, (B, stop - start, d) float32."""
        cols = self.cols.float()
        if not self.sparse:
            out.baddbmm_(self.rows[:, :, start:stop].float().transpose(1, 2), cols)
            return
        cols = cols * ((self.rows >= start) & (self.rows < stop)).unsqueeze(2)
        places = (self.rows - start).clamp(0, stop - start - 1)
        out.scatter_add_(1, places.unsqueeze(2).expand_as(cols), cols)

    def written(self, shape: torch.Size) -> Tensor:
        """Write the gradients down, (B, *shape)."""
        if not self.sparse:
            rows, cols = self.rows, self.cols
            if rows.shape[2] <= cols.shape[2]:
                return bmm(rows.transpose(1, 2), cols)
            # with the longer one in the middle it takes 2.5 times as long on a CPU
            return bmm(cols.transpose(1, 2), rows).transpose(1, 2).contiguous()
        cols = self.cols.float()
        out = cols.new_zeros(self.rows.shape[0], *shape)
        return out.scatter_add_(1, self.rows.unsqueeze(2).expand_as(cols), cols)

    def inner(self, other: Outer) -> Tensor:
        """<ours, theirs> per record, (B,): sum over t, s of <u_t, u'_s> <v_t, v'_s>."""
        cols = bmm(self.cols, other.cols.transpose(1, 2))  # (B, T, S)
        if self.sparse and other.sparse:
            rows = self.rows.unsqueeze(2) == other.rows.unsqueeze(1)
        elif self.sparse:
            picks = self.rows.unsqueeze(1).expand(-1, other.rows.shape[1], -1)  # (B, S, T)
            rows = other.rows.gather(2, picks).transpose(1, 2)
        elif other.sparse:
            picks = other.rows.unsqueeze(1).expand(-1, self.rows.shape[1], -1)  # (B, T, S)
            rows = self.rows.gather(2, picks)
        else:
            rows = bmm(self.rows, other.rows.transpose(1, 2))
        return cols.mul_(rows).sum((1, 2), dtype=torch.float64)

    def reach(self) -> Tensor:
        """The norm if no terms cancelled, (B,) float64: sum over t of |u_t| |v_t|."""
        lengths = torch.linalg.vector_norm(self.cols, dim=2, dtype=torch.float32)
        if not self.sparse:
            lengths = lengths * torch.linalg.vector_norm(self.rows, dim=2, dtype=torch.float32)
        total: Tensor = lengths.sum(1, dtype=torch.float64)
        return total

    def add_weighted(self, factors: Tensor, out: Tensor) -> None:
        """Add the sum over records of factor times gradient to `out`, (p, d)."""
        cols = (self.cols.float() * factors[:, None, None]).flatten(0, 1)
        if self.sparse:
            out.index_add_(0, self.rows.flatten(), cols)
        else:
            out.addmm_(self.rows.flatten(0, 1).float().T, cols)


Part = Outer | Blocked | Tensor
"""What one call of a layer adds to the records' gradients of a parameter. A Tensor is
(B, *shape)."""


def parts(call: Call | BlockedCall, batch: int) -> Iterator[tuple[nn.Parameter, Part]]:
    """Gradients of each record by the layer's own trainable parameters.

    Raises:
        ConfigError: this layer's gradients can't be separated by record.
    """
    if isinstance(call, BlockedCall):
        yield from _blocked(call)
        return
    module, grad = call.module, call.grad
    first = call.inputs[0] if call.inputs else None
    shapes = [x.shape[:1] for x in (first, grad) if isinstance(x, Tensor)]
    if shapes != [(batch,)] * 2 or not isinstance(first, Tensor):
        raise ConfigError(f"{type(module).__name__} has no batch dimension, or not as its first")
    if type(module) is nn.Embedding:
        yield from _embedding(module, first, grad)
    elif type(module) is nn.Linear:
        yield from _trainable(module, Outer(_tokens(grad), _tokens(first)), grad)
    elif _multiplies(module):
        yield from _trainable(module, Outer(_tokens(first), _tokens(grad)), grad)
    else:
        yield from _small(in_full(call), batch)


def _small(call: Call, batch: int) -> Iterator[tuple[nn.Parameter, Part]]:
    """Gradients by parameters that are written down."""
    module, grad = call.module, call.grad
    first: Any = call.inputs[0]
    if type(module) is nn.LayerNorm and module.elementwise_affine:
        normed = functional.layer_norm(first, module.normalized_shape, None, None, module.eps)
        yield from _trainable(module, _summed(grad * normed, module.weight), grad)
    elif _is_scale(module):
        yield from _scale(module, call, grad)
    else:
        yield from _anything(call, batch)


def in_full(call: Call) -> Call:
    """A call with its values in float32, if the forward pass ran in less precision. Products and
    norms of them then lose nothing further.
    """
    inputs = tuple(
        x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in call.inputs
    )
    return Call(call.module, inputs, call.keywords, call.grad.float())


def _tokens(x: Tensor) -> Tensor:
    """Reshape (B, ..., d) to (B, T, d)."""
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)


def _summed(x: Tensor, like: Tensor) -> Tensor:
    """Sum over all dimensions between the batch and the parameter's own: (B, *like.shape)."""
    return x.flatten(1, -1 - like.dim()).sum(1) if x.dim() > 1 + like.dim() else x


def _trainable(module: Any, weight: Part, grad: Tensor) -> Iterator[tuple[nn.Parameter, Part]]:
    if module.weight.requires_grad:
        yield module.weight, weight
    if module.bias is not None and module.bias.requires_grad:
        yield module.bias, _summed(grad.float(), module.bias)


def _blocked(call: BlockedCall) -> Iterator[tuple[nn.Parameter, Part]]:
    weight: Any = call.module.weight
    bias: Any = call.module.bias
    if weight.requires_grad:
        yield weight, call.factors
    if bias is not None and bias.requires_grad:
        yield bias, call.factors.sums()


def _embedding(
    module: nn.Embedding, ids: Tensor, grad: Tensor
) -> Iterator[tuple[nn.Parameter, Part]]:
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        raise ConfigError("an embedding with max_norm, scale_grad_by_freq or sparse gradients")
    weight: Any = module.weight
    ids, grad = ids.flatten(1), _tokens(grad)
    if module.padding_idx is not None:  # autograd leaves this row out
        grad = grad.masked_fill((ids == module.padding_idx).unsqueeze(2), 0.0)
    if weight.requires_grad:
        yield weight, Outer(ids, grad)


def _is_scale(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    return type(module).__name__.endswith("RMSNorm") and set(own) == {"weight"}


def _scale(module: nn.Module, call: Call, grad: Tensor) -> Iterator[tuple[nn.Parameter, Part]]:
    """Gradient by the weight of an RMSNorm. Its output is linear in the weight (or in 1 + weight),
    so the slope is f(1) - f(0).
    """
    weight: Any = module.weight
    with torch.no_grad():
        ones, zeros = torch.ones_like(weight), torch.zeros_like(weight)
        run = torch.func.functional_call
        slope = run(module, {"weight": ones}, call.inputs, call.keywords)
        slope = slope - run(module, {"weight": zeros}, call.inputs, call.keywords)
    yield weight, _summed(grad * slope, weight)


def _anything(call: Call, batch: int) -> Iterator[tuple[nn.Parameter, Part]]:
    """Gradients by the parameters of any layer: run it again for all records (torch.func.vmap)."""
    module, grad = call.module, call.grad
    own = {n: p for n, p in module.named_parameters(recurse=False) if p.requires_grad}
    values = {name: p.detach() for name, p in own.items()}
    if any(isinstance(x, Tensor) and x.shape[:1] != (batch,) for x in call.inputs):
        raise ConfigError(f"{type(module).__name__} has inputs without a batch dimension")
    tensors = tuple(x for x in call.inputs if isinstance(x, Tensor))
    if len(tensors) != len(call.inputs) or call.keywords:
        raise ConfigError(f"{type(module).__name__} takes more than tensors")

    def gradient(record: tuple[Tensor, ...], back: Tensor) -> dict[str, Tensor]:
        def run(parameters: dict[str, Tensor]) -> Tensor:
            inputs = tuple(x.unsqueeze(0) for x in record)
            out: Tensor = torch.func.functional_call(module, parameters, inputs)
            return out

        pull: Any = torch.func.vjp(run, values)[1]
        by_name: dict[str, Tensor] = pull(back.unsqueeze(0))[0]
        return by_name

    gradients: Any = torch.func.vmap(gradient)(tensors, grad)
    for name, parameter in own.items():
        yield parameter, gradients[name]
