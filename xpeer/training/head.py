"""The output layer of a causal language model in pieces: never are all logits there at once.

A vocabulary of 150,000 makes a record of 2,048 tokens 1.2 GB of logits in float32, several times
over in a backward pass. Here the inner model gives the hidden states. The output layer follows for
some tokens at a time, and its logits are dropped after each piece.

What is not given: families that do more with their logits than to scale and to cap them. `find`
notices, and the caller lets the model compute its logits itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from xpeer.training.recompute import transformed

_CPU_LOGITS: Final = 1 << 26
"""Logits of a piece on a processor. A smaller piece reads the layer's weights too often."""
_CPU_LOGITS_FROZEN: Final = 1 << 24
"""The same, if the layer is frozen: its own gradient is not read and written for each piece."""
_DEVICE_LOGITS: Final = 1 << 27
_TRIED: Final = 3
"""Tokens on which it is tried whether a family is understood."""


@dataclass(frozen=True, slots=True)
class Head:
    """logits = cap tanh(scale W h / cap); without a cap, scale W h."""

    body: nn.Module
    """The model without its output layer."""
    layer: nn.Module
    """W."""
    scale: float = 1.0
    cap: float | None = None

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
        plain = type(self.layer) is nn.Linear
        return plain and not any(p.requires_grad for p in self.layer.parameters())


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
    head = Head(body, layer, float(scale) / float(divided), cap and float(cap))
    return head if _understood(model, head) else None


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
    logits = _CPU_LOGITS_FROZEN if head.frozen else _CPU_LOGITS
    if hidden.device.type != "cpu":
        logits = _DEVICE_LOGITS
    tokens = max(1, logits // (vocabulary * len(hidden)))
    # torch.func knows neither of what follows
    usual = torch.is_grad_enabled() and not transformed(hidden)
    if head.frozen and hidden.requires_grad and usual:
        apply: Any = _FrozenHead.apply
        losses: Tensor = apply(hidden, targets, head, tokens)
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
        kind = hidden.device.type
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        layer: Any = head.layer
        weight = layer.weight.to(low)
        bias = None if layer.bias is None else layer.bias.to(low)
        losses = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        slopes = torch.empty_like(hidden)
        with torch.autocast(kind, enabled=False):
            for at in range(0, hidden.shape[1], tokens):
                part = slice(at, at + tokens)
                logits = nn.functional.linear(hidden[:, part].to(low), weight, bias)
                losses[:, part], by_logits = _loss_and_slope(head, logits, targets[:, part])
                slopes[:, part] = by_logits.to(low) @ weight
        ctx.save_for_backward(slopes)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return slopes * grad.unsqueeze(2).to(slopes.dtype), None, None, None


def _loss_and_slope(head: Head, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (B, T) float32, and their gradients by the layer's output, (B, T, V) float32."""
    logits = logits.float()
    slope: Tensor | float = head.scale
    if head.scale != 1.0:
        logits = logits.mul_(head.scale)
    if head.cap is not None:
        bent = logits.div_(head.cap).tanh_()
        slope = (1 - bent.square()).mul_(head.scale)
        logits = bent.mul_(head.cap)
    some = targets >= 0
    places = targets.clamp(min=0).unsqueeze(2)
    norms = torch.logsumexp(logits, 2)
    losses = (norms - logits.gather(2, places).squeeze(2)).masked_fill(~some, 0.0)
    by_logits = logits.sub_(norms.unsqueeze(2)).exp_()
    by_logits.scatter_add_(2, places, torch.full_like(norms, -1.0).unsqueeze(2))
    by_logits.mul_(some.unsqueeze(2))
    return losses, by_logits.mul_(slope)
