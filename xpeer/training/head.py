"""The output layer of a causal language model in pieces: never are all logits there at once.

A vocabulary of 150,000 makes a record of 2,048 tokens 1.2 GB of logits in float32, several times
over in a backward pass. Here the inner model gives the hidden states. The output layer follows for
some tokens at a time, and its logits are dropped after each piece.

What is not given: families that do more with their logits than to scale and to cap them. `find`
notices, and the caller lets the model compute its logits itself.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from xpeer.privacy.at_once import values_at_once
from xpeer.privacy.blocks import Blocked, BlockedCall, are_kept
from xpeer.privacy.layers import OnCall, watch_of
from xpeer.training.held import is_product
from xpeer.training.recompute import transformed

_CPU_LOGITS: Final = 1 << 26
"""Logits of a piece on a processor. A smaller piece reads the layer's weights too often."""
_CPU_LOGITS_FROZEN: Final = 1 << 24
"""The same, if its own gradient is not read and written for each piece: it is frozen, each record's
gradient is wanted, or none."""
_DEVICE_LOGITS: Final = 1 << 27
_TRIED: Final = 3
"""Tokens on which it is tried whether a family is understood."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """What a low-rank adapter adds to W h: scale B A h."""

    a: nn.Linear
    b: nn.Linear
    scale: float


@dataclass(frozen=True, slots=True)
class Head:
    """logits = cap tanh(scale W h / cap); without a cap, scale W h."""

    body: nn.Module
    """The model without its output layer."""
    layer: nn.Module
    """W, with its adapter if it has one."""
    scale: float = 1.0
    cap: float | None = None
    adapter: Adapter | None = None
    """None = there is none, or `layer` does more with it."""

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits of (..., d) hidden states, (..., vocabulary)."""
        logits: Tensor = self.layer(hidden)
        return self.finished(logits)

    def finished(self, logits: Tensor) -> Tensor:
        """What the family does with its layer's output."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits

    @property
    def frozen(self) -> bool:
        """Whether its gradient by the hidden states is all that is needed."""
        return is_product(self.layer) and not any(p.requires_grad for p in self.layer.parameters())


def find(model: Any) -> Head | None:
    """The output layer of a transformers model. None if this family is not understood.

    It is tried: the layer's output is replaced by random numbers, and the model's logits have to be
    what `Head` makes of them. The layer's input has to be what the inner model returned.
    """
    config, layer, body = model.config.get_text_config(), model.get_output_embeddings(), None
    body = model.base_model
    if not isinstance(layer, nn.Module) or body is model:
        return None
    scale = getattr(config, "logit_scale", None) or 1.0
    divided = getattr(config, "logits_scaling", None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None)
    factor, adapter = float(scale) / float(divided), _adapter_of(layer)
    head = Head(body, layer, factor, cap and float(cap), adapter)
    return head if _understood(model, head) else None


def _adapter_of(layer: Any) -> Adapter | None:
    """The adapter that `adapters.adapt` gave an output layer; None = there is none, or it is not
    what it makes.
    """
    base, names = getattr(layer, "base_layer", None), list(getattr(layer, "lora_A", ()))
    if base is None or not is_product(base) or any(p.requires_grad for p in base.parameters()):
        return None
    if len(names) != 1 or layer.active_adapters != names or getattr(layer, "lora_variant", None):
        return None
    a, b, between = (each[names[0]] for each in (layer.lora_A, layer.lora_B, layer.lora_dropout))
    linear = {type(a), type(b)} == {nn.Linear} and a.bias is None and b.bias is None
    in_use = not layer.merged and not layer.disable_adapters
    if not (linear and in_use and isinstance(between, nn.Identity)):
        return None
    return Adapter(a, b, float(layer.scaling[names[0]]))


def _understood(model: Any, head: Head) -> bool:
    device = next(model.parameters()).device
    ids = torch.arange(_TRIED, device=device)[None]
    given: list[Any] = []
    taken: list[Any] = []
    replaced: list[Tensor] = []

    def note_body(_module: nn.Module, _inputs: Any, output: Any) -> None:
        given.append(output[0])

    def replace(_module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        taken.append(inputs[0])
        spread = torch.linspace(-40.0, 40.0, output.numel(), device=output.device)
        replaced.append(spread.view(output.shape).to(output.dtype))
        return replaced[-1]

    handles = [head.body.register_forward_hook(note_body)]
    handles.append(head.layer.register_forward_hook(replace))
    try:
        with torch.no_grad():
            found = model(input_ids=ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    if not (len(given) == len(taken) == 1) or given[0].shape != taken[0].shape:
        return False
    same = torch.equal(torch.nan_to_num(given[0]), torch.nan_to_num(taken[0]))
    return same and torch.allclose(head.finished(replaced[0]).float(), found.float(), rtol=1e-3)


def logits_at_once(num_logits: int) -> int:
    """The most of so many logits that are there at once on a GPU."""
    return min(num_logits, _DEVICE_LOGITS)


def losses_of_tokens(head: Head, hidden: Tensor, targets: Tensor, cross_entropy: Any) -> Tensor:
    """Cross-entropy of each token, (B, T) float32; 0 where the target is negative.

    Args:
        head: the output layer.
        hidden: (B, T, d), of the inner model.
        targets: (B, T) int64.
        cross_entropy: of (n, vocabulary) logits and (n,) targets, (n,) float32.
    """
    layer: Any = head.layer
    vocabulary = len(layer.weight)
    # torch.func knows neither of what follows
    usual = torch.is_grad_enabled() and not transformed(hidden)
    watched = layer if head.adapter is None else head.adapter.b
    watch = watch_of(watched) if usual and is_product(watched) else None
    if watch is not None and are_kept(vocabulary * targets.numel(), len(targets), hidden.device):
        watch = None  # the layer is called, and its factors are kept
    none_by_piece = head.frozen or watch is not None or not torch.is_grad_enabled()
    on_processor = _CPU_LOGITS_FROZEN if none_by_piece else _CPU_LOGITS
    logits = values_at_once(hidden.device, on_processor, _DEVICE_LOGITS)
    tokens = max(1, logits // (vocabulary * len(hidden)))
    losses: Tensor
    if head.frozen and hidden.requires_grad and usual:
        of_frozen: Any = _FrozenHead.apply
        losses = of_frozen(hidden, targets, head, tokens)
        return losses
    if watch is not None:
        of_watched: Any = _WatchedHead.apply
        small = None if head.adapter is None else head.adapter.a(hidden)
        losses = of_watched(hidden, small, watch.probe, targets, head, tokens, watch.on_call)
        return losses

    def of_piece(some: Tensor, wanted: Tensor) -> Tensor:
        made = cross_entropy(head.logits(some).flatten(0, 1), wanted.flatten())
        flat: Tensor = made.view_as(wanted)
        return flat

    again = usual and tokens < hidden.shape[1]
    pieces = []
    for some, wanted in zip(
        torch.split(hidden, tokens, 1), torch.split(targets, tokens, 1), strict=True
    ):
        if again:  # logits are computed again in the backward pass
            pieces.append(checkpoint(of_piece, some, wanted, use_reentrant=False))
        else:
            pieces.append(of_piece(some, wanted))
    return torch.cat(pieces, 1)


class _FrozenHead(torch.autograd.Function):
    """Losses under a layer that is not trained. The gradient by the hidden states is computed at
    once, so that no logits are kept, and none computed again.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, head: Head, tokens: int) -> Tensor:
        losses, (slopes,), _ = _in_pieces(head, [_low(hidden)], targets, tokens)
        ctx.save_for_backward(slopes.to(hidden.dtype))
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return slopes * grad.unsqueeze(2).to(slopes.dtype), None, None, None


class _WatchedHead(torch.autograd.Function):
    """Losses under a layer that is trained, or B of its adapter, where each record's gradient by it
    is wanted. No logits are kept. Whoever watches it gets a way to compute some of their gradients
    again.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, small: Tensor | None, probe: Tensor, targets: Tensor, head: Head,
        tokens: int, on_call: OnCall,
    ) -> Tensor:  # fmt: skip
        given = [x for x in (hidden, small) if x is not None]
        low = [_low(x) for x in given]
        losses, slopes, norms = _in_pieces(head, low, targets, tokens)
        slopes = [slope.to(x.dtype) for slope, x in zip(slopes, given, strict=True)]
        ctx.save_for_backward(*slopes, *low, targets, norms)
        ctx.head, ctx.on_call = head, on_call
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *both, targets, norms = ctx.saved_tensors
        slopes, low = both[: len(both) // 2], both[len(both) // 2 :]
        adapter: Adapter | None = ctx.head.adapter
        watched: Any = ctx.head.layer if adapter is None else adapter.b
        weights = grad.masked_fill(targets < 0, 0.0)
        if adapter is not None:
            weights = weights * adapter.scale
        rows = functools.partial(_rows, ctx.head, low, targets, norms, weights)
        ctx.on_call(BlockedCall(watched, Blocked(rows, low[-1], len(watched.weight))))
        found = [slope * grad.unsqueeze(2).to(slope.dtype) for slope in slopes]
        return *found, *[None] * (7 - len(found))


def _low(hidden: Tensor) -> Tensor:
    """Hidden states as autocast would have the layer multiply them."""
    kind = hidden.device.type
    wanted = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    return hidden.detach().to(wanted)


def _in_pieces(
    head: Head, inputs: Sequence[Tensor], targets: Tensor, tokens: int
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Losses, (B, T) float32; their gradients by the inputs; and the log of the sum of exp(logits),
    (B, T) float32. So many tokens at a time.

    Args:
        head: the output layer.
        inputs: (B, T, d) hidden states; with an adapter also (B, T, rank), what A makes of them.
        targets: (B, T) int64.
        tokens: of a piece.
    """
    hidden = inputs[0]
    losses = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
    norms, slopes = torch.empty_like(losses), [torch.empty_like(x) for x in inputs]
    matrices, bias = _matrices(head, inputs)  # once, if they are held in another type
    silent = targets < 0
    with torch.autocast(hidden.device.type, enabled=False):
        for at in range(0, hidden.shape[1], tokens):
            part = slice(at, at + tokens)
            outputs = _outputs(head, [x[:, part] for x in inputs], matrices, bias)
            logits, slope = _finished(head, outputs)
            norms[:, part] = torch.logsumexp(logits, 2)
            chosen = logits.gather(2, targets[:, part].clamp(min=0).unsqueeze(2)).squeeze(2)
            losses[:, part] = norms[:, part] - chosen
            by_logits = _by_logits(logits, slope, targets[:, part], norms[:, part])
            for by_input, matrix in zip(slopes, matrices, strict=True):
                by_input[:, part] = by_logits.to(matrix.dtype) @ matrix
    if head.adapter is not None:
        slopes[1].mul_(head.adapter.scale)
    for by_input in slopes:
        by_input.masked_fill_(silent.unsqueeze(2), 0.0)
    return losses.masked_fill_(silent, 0.0), slopes, norms


def _rows(
    head: Head, inputs: Sequence[Tensor], targets: Tensor, norms: Tensor, grad: Tensor,
    start: int, stop: int,
) -> Tensor:  # fmt: skip
    """Gradients by the layer's outputs from `start` up to `stop`, (B, T, n).

    Args:
        head: the output layer.
        inputs: of `_in_pieces`.
        targets: (B, T) int64.
        norms: (B, T), of `_in_pieces`.
        grad: the gradient by each token's loss, (B, T); 0 where nothing is predicted.
        start: the first output.
        stop: the output behind the last one.
    """
    with torch.autocast(norms.device.type, enabled=False):
        logits, slope = _finished(
            head, _outputs(head, inputs, *_matrices(head, inputs, slice(start, stop)))
        )
        by_logits = _by_logits(logits, slope, targets, norms, start)
        return by_logits.mul_(grad.unsqueeze(2)).to(inputs[-1].dtype)


def _matrices(
    head: Head, inputs: Sequence[Tensor], rows: slice = slice(None)
) -> tuple[list[Tensor], Tensor | None]:
    """Some rows of what each input is multiplied by, in its type; and of the bias."""
    layer: Any = head.layer if head.adapter is None else head.layer.base_layer
    of = [layer] if head.adapter is None else [layer, head.adapter.b]
    found = [m.weight.detach()[rows].to(x.dtype) for m, x in zip(of, inputs, strict=True)]
    return found, None if layer.bias is None else layer.bias.detach()[rows].to(inputs[0].dtype)


def _outputs(
    head: Head, inputs: Sequence[Tensor], matrices: Sequence[Tensor], bias: Tensor | None
) -> Tensor:
    """Outputs of some of the layer's rows, (B, T, n)."""
    # contiguous, else it is multiplied record by record
    made = nn.functional.linear(inputs[0].contiguous(), matrices[0], bias)
    if head.adapter is not None:
        added = nn.functional.linear(inputs[1].contiguous(), matrices[1])
        made.add_(added, alpha=head.adapter.scale)
    return made


def _finished(head: Head, logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """As `Head.finished`, in float32 and in place. And its slope, None = 1."""
    logits = logits.float()
    slope: Tensor | None = None
    if head.scale != 1.0:
        logits = logits.mul_(head.scale)
    if head.cap is not None:
        bent = logits.div_(head.cap).tanh_()
        slope = (1 - bent.square()).mul_(head.scale)
        logits = bent.mul_(head.cap)
    elif head.scale != 1.0:
        slope = logits.new_tensor(head.scale)
    return logits, slope


def _by_logits(
    logits: Tensor, slope: Tensor | None, targets: Tensor, norms: Tensor, start: int = 0
) -> Tensor:
    """Gradients of losses by the layer's outputs from `start` on, in the place of (B, T, n) logits.

    Where the target is negative, they are those of no loss.
    """
    count = logits.shape[2]
    by_logits = logits.sub_(norms.unsqueeze(2)).exp_()
    places = targets - start
    inside = (places >= 0) & (places < count)
    places = places.clamp(0, count - 1).unsqueeze(2)
    by_logits.scatter_add_(2, places, -inside.unsqueeze(2).to(by_logits.dtype))
    return by_logits if slope is None else by_logits.mul_(slope)
