"""A small byte-level Llama, trained by N peers at once: every matrix product is a batch over peers.

Pre-norm blocks of rotary attention and SwiGLU, RMSNorm, tied embeddings, no biases (Touvron et al.
2023, section 2.2). A peer's parameters are one row of an (N, P) matrix, in the order of `_shapes`,
so that fragments, codecs and rules see the flat vector that the trainer shows them.

Mixed precision as on a GPU: float32 parameters and residual stream, products of bfloat16. On one
core with AVX512-BF16 a step of four peers takes 66 ms instead of 97; torch.compile gained nothing.
Evaluation is in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch.nn import functional

VOCABULARY: Final = 256
WIDTH: Final = 96
LAYERS: Final = 3
HEADS: Final = 3
HIDDEN: Final = 256
CONTEXT: Final = 64
"""Bytes a record predicts; a record is one byte longer."""
INITIAL_SCALE: Final = 0.02
EPSILON: Final = 1e-6

_HEAD: Final = WIDTH // HEADS


def _shapes() -> list[tuple[str, tuple[int, ...]]]:
    """(in, out) for matrices; no peers' dimension."""
    shapes: list[tuple[str, tuple[int, ...]]] = [("embedding", (VOCABULARY, WIDTH))]
    for layer in range(LAYERS):
        shapes += [
            (f"{layer}.norm_attention", (WIDTH,)),
            (f"{layer}.qkv", (WIDTH, 3 * WIDTH)),
            (f"{layer}.attended", (WIDTH, WIDTH)),
            (f"{layer}.norm_mlp", (WIDTH,)),
            (f"{layer}.gate_up", (WIDTH, 2 * HIDDEN)),
            (f"{layer}.down", (HIDDEN, WIDTH)),
        ]
    return [*shapes, ("norm", (WIDTH,))]


SHAPES: Final = _shapes()
NUM_PARAMS: Final = sum(math.prod(shape) for _, shape in SHAPES)

Weights = dict[str, torch.Tensor]
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class _Bfloat16Product(torch.autograd.Function):
    """bmm of operands rounded to bfloat16, accumulated in float32; its gradients as well."""

    @staticmethod
    def forward(ctx: Any, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        left, right = left.bfloat16(), right.bfloat16()
        ctx.save_for_backward(left, right)
        return torch.bmm(left, right).float()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        left, right = ctx.saved_tensors
        grad = grad.bfloat16()
        to_left = torch.bmm(grad, right.transpose(1, 2)).float()
        return to_left, torch.bmm(left.transpose(1, 2), grad).float()


def mixed(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(n, a, b) and (n, b, c), float32, to (n, a, c)."""
    out: torch.Tensor = _Bfloat16Product.apply(left, right)  # type: ignore[no-untyped-call]
    return out


def initial(generator: torch.Generator) -> torch.Tensor:
    """Parameters that all peers start from, (P,) float32."""
    parts = []
    for name, shape in SHAPES:
        if "norm" in name:
            parts.append(torch.ones(shape).view(-1))
        else:
            into_stream = name.endswith(("attended", "down"))
            scale = INITIAL_SCALE / math.sqrt(2 * LAYERS) if into_stream else INITIAL_SCALE
            parts.append(scale * torch.randn(shape, generator=generator).view(-1))
    return torch.cat(parts)


def gradients(
    theta: torch.Tensor, records: torch.Tensor, product: Product = mixed
) -> tuple[torch.Tensor, torch.Tensor]:
    """Every peer's gradient of its own records' mean loss.

    Args:
        theta: (n, P) float32.
        records: (n, batch, CONTEXT + 1) int64.
        product: of matrices.

    Returns:
        (n, P) gradients, and (n,) losses in nats per byte.
    """
    weights = {name: view.detach().requires_grad_() for name, view in _views(theta).items()}
    losses = _losses(weights, records, product).mean(dim=1)
    grads = torch.autograd.grad(losses.sum(), list(weights.values()))
    n = theta.shape[0]
    return torch.cat([grad.reshape(n, -1) for grad in grads], dim=1), losses.detach()


@torch.no_grad()
def evaluate(theta: torch.Tensor, records: torch.Tensor, at_once: int = 64) -> torch.Tensor:
    """Mean loss of each of several models on the same records, (n,) nats per byte.

    Args:
        theta: (n, P) float32.
        records: (r, CONTEXT + 1) int64.
        at_once: records per pass, which bounds memory.
    """
    n = theta.shape[0]
    weights = _views(theta)
    total = torch.zeros(n)
    for part in torch.split(records, at_once):
        total += _losses(weights, part.expand(n, *part.shape), torch.bmm).sum(dim=1)
    return total / (records.shape[0] * CONTEXT)


@torch.no_grad()
def accuracy(theta: torch.Tensor, records: torch.Tensor, at_once: int = 64) -> torch.Tensor:
    """Share of next bytes that each of several models ranks first, (n,); as `evaluate`."""
    n = theta.shape[0]
    weights = _views(theta)
    right = torch.zeros(n)
    for part in torch.split(records, at_once):
        guesses = _logits(weights, part.expand(n, *part.shape), torch.bmm).argmax(dim=-1)
        right += (guesses == part[:, 1:].reshape(1, -1)).sum(dim=1)
    return right / (records.shape[0] * CONTEXT)


def _views(theta: torch.Tensor) -> Weights:
    """(n, *shape) views of (n, P)."""
    sizes = [math.prod(shape) for _, shape in SHAPES]
    parts = torch.split(theta, sizes, dim=1)
    return {name: part.view(-1, *shape) for (name, shape), part in zip(SHAPES, parts, strict=True)}


def _losses(weights: Weights, records: torch.Tensor, product: Product) -> torch.Tensor:
    """Loss of every predicted byte, (n, batch * CONTEXT)."""
    logits = _logits(weights, records, product)
    targets = records[:, :, 1:].reshape(-1)
    flat = functional.cross_entropy(logits.view(-1, VOCABULARY), targets, reduction="none")
    return flat.view(records.shape[0], -1)


def _logits(weights: Weights, records: torch.Tensor, product: Product) -> torch.Tensor:
    """(n, batch * CONTEXT, VOCABULARY)."""
    n, batch = records.shape[:2]
    inputs = records[:, :, :-1].reshape(n, -1)
    embedding = weights["embedding"]
    of_peer = VOCABULARY * torch.arange(n).unsqueeze(1)
    stream = functional.embedding(inputs + of_peer, embedding.reshape(-1, WIDTH))
    for layer in range(LAYERS):
        normed = _norm(stream, weights[f"{layer}.norm_attention"])
        attended = _attend(product(normed, weights[f"{layer}.qkv"]), batch)
        stream = stream + product(attended, weights[f"{layer}.attended"])
        normed = _norm(stream, weights[f"{layer}.norm_mlp"])
        gate, up = product(normed, weights[f"{layer}.gate_up"]).chunk(2, dim=-1)
        stream = stream + product(functional.silu(gate) * up, weights[f"{layer}.down"])
    return product(_norm(stream, weights["norm"]), embedding.transpose(1, 2))


def _norm(stream: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(stream, (WIDTH,), eps=EPSILON) * weight.unsqueeze(1)


def _attend(qkv: torch.Tensor, batch: int) -> torch.Tensor:
    """Causal attention within each record; (n, batch * CONTEXT, 3 * WIDTH) to (..., WIDTH)."""
    n = qkv.shape[0]
    heads = qkv.view(n * batch, -1, 3 * HEADS, _HEAD).transpose(1, 2)
    turned = _rotate(heads[:, : 2 * HEADS])
    out = functional.scaled_dot_product_attention(
        turned[:, :HEADS], turned[:, HEADS:], heads[:, 2 * HEADS :], is_causal=True
    )
    return out.transpose(1, 2).reshape(n, -1, WIDTH)


def _angles() -> tuple[torch.Tensor, torch.Tensor]:
    frequency = 10_000.0 ** (-torch.arange(0, _HEAD, 2) / _HEAD)
    angle = torch.arange(CONTEXT).unsqueeze(1) * frequency
    return torch.cat((angle, angle), dim=1).cos(), torch.cat((angle, angle), dim=1).sin()


_COS, _SIN = _angles()  # (CONTEXT, _HEAD) float32


def _rotate(heads: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of (..., CONTEXT, _HEAD) (Su et al. 2021, equation 34)."""
    low, high = heads.chunk(2, dim=-1)
    return heads * _COS + torch.cat((-high, low), dim=-1) * _SIN
