"""Computes losses of a causal language model, and chooses the device."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any, Final

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from xpeer.errors import ConfigError, LocalError
from xpeer.privacy.at_once import values_at_once
from xpeer.privacy.clipping import RecordLosses
from xpeer.privacy.fitting import halved, until_it_fits
from xpeer.privacy.steps import Precision
from xpeer.training import head
from xpeer.training.held import is_product

TokenLosses = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""Losses of (B, T) ids, targets and positions, by token; positions None = 0, 1, ... in each row."""

NO_TARGET: Final = -100
"""A target where nothing is predicted."""
MEASURED_RECORDS: Final = 16
"""Records of a pass that measures a loss, where nothing asks for fewer."""
_CPU_VALUES: Final = 1 << 20
"""Logits per piece of the loss, on a CPU: 4 MB fit its caches."""
_NO_FLOAT64: Final = (
    "norms and noise of private gradients are added up in float64, which mps does not have"
)
_DEVICE_VALUES: Final = 1 << 27
"""Logits per piece on other devices, where only memory matters."""


def choose_device(name: str = "auto", *, private: bool = False) -> tuple[torch.device, str]:
    """Choose the device to train on: cuda > mps > cpu, or the one that is named.

    Args:
        name: `training.device`.
        private: whether gradients are private. They need float64, which mps does not have.

    Returns:
        The device, and a line for the operator if a faster one was left out; else "".

    Raises:
        ConfigError: torch can't use that device here, or not for this.
    """
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        first, *others = (kind for kind, usable in there.items() if usable)
        if first == "mps" and private:
            return torch.device(others[0]), f"computing on the {others[0]}: {_NO_FLOAT64}"
        return torch.device(first), ""
    if name == "mps" and private:
        raise ConfigError(
            f"training.device = mps: {_NO_FLOAT64}",
            "set it to cpu, or to auto, which does the same",
        )
    if not there.get(name, False):
        raise ConfigError(
            f"training.device = {name}: this machine has none that torch can use",
            f"set it to auto or one of: {', '.join(k for k, usable in there.items() if usable)}",
        )
    return torch.device(name), ""


def autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Have forward passes in bfloat16 on devices that are fast at them; do nothing on others."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return contextlib.nullcontext()


def record_losses(
    model: torch.nn.Module, records: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the next-token cross-entropy, summed per record; records do not see one another.

    Args:
        model: causal language model, or a wrapper around one.
        records: (records, tokens) int64, on the model's device; see `inputs_of`.

    Returns:
        Sums of negative log-likelihoods in nats, (records,) float32, and numbers of targets,
        (records,).
    """
    return losses_of(model, *inputs_of(records))


def choose_losses(model: torch.nn.Module) -> tuple[RecordLosses, str]:
    """`record_losses` for this model, without all logits at once where its family is understood.

    Returns:
        The loss, for this very model or wrappers of it, and a note for the operator; "" = all is
        well.
    """
    inner = transformers_model(model)
    found = head.find(inner)
    if found is None:
        family = inner.config.model_type
        note = f"a batch's logits are kept as a whole: the output layer of {family} is not known"
        return record_losses, f"{note}; a smaller training.micro_batch needs less memory"
    return functools.partial(_without_all_logits, found), ""


def kept_logits(model: torch.nn.Module) -> str:
    """A note for the operator of private steps, if each record keeps the gradient of all of its
    logits; "" = only as many as are kept for speed (`blocks.kept_values`).
    """
    found = head.find(transformers_model(model))
    if found is None or found.adapter is not None or is_product(found.layer):
        return ""
    return (
        "each record keeps the gradients of all its logits, since the output layer is no plain "
        "matrix; other model.lora.targets, or a smaller training.micro_batch, need less memory"
    )


def token_losses(model: torch.nn.Module) -> TokenLosses:
    """As `choose_losses`, but by token, and for positions of the caller's choice."""
    found = head.find(transformers_model(model))
    return functools.partial(_of_tokens, model, found)


def _without_all_logits(
    output: head.Head, model: torch.nn.Module, records: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `record_losses`; the model that `output` is of computes."""
    ids, targets = inputs_of(records)
    return _of_tokens(model, output, ids, targets, None).sum(1), (targets >= 0).sum(1)


def _of_tokens(
    model: torch.nn.Module,
    output: head.Head | None,
    ids: torch.Tensor,
    targets: torch.Tensor,
    positions: torch.Tensor | None,
) -> torch.Tensor:
    """Cross-entropy of each token, (B, T) float32; 0 where the target is negative."""
    computing: Any = transformers_model(model) if output is None else output.body
    extra = _positions(computing, ids) if positions is None else {"position_ids": positions}
    if output is None:
        logits = model(input_ids=ids, use_cache=False, **extra).logits  # (B, T, vocabulary)
        return _cross_entropy(logits.flatten(0, 1), targets.flatten()).view_as(targets)
    hidden = output.body(input_ids=ids, use_cache=False, **extra)[0]
    return head.losses_of_tokens(output, hidden, targets, _cross_entropy)


def inputs_of(records: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model reads, and what it predicts from that: both (records, tokens - 1) int64.

    A token is read and predicted. A number below -1 is a token that is read only, -2 - token: for
    instance the question, where the loss is that of the answer. -1 fills a record up
    (`records.FILL`): it is neither, and stands at the right, where causal attention never looks, so
    that no mask is needed. Where nothing is predicted, the target is negative.
    """
    read = torch.maximum(records, -2 - records)  # of -1 it makes -1
    ids = read[:, :-1].clamp(min=0)  # any token will do where the record is filled up
    # the last token predicts nothing, so the model never sees it
    return ids, records[:, 1:].masked_fill(records[:, 1:] < 0, NO_TARGET)


def losses_of(
    model: torch.nn.Module, ids: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `record_losses`, for what `inputs_of` returns."""
    return _of_tokens(model, None, ids, targets, None).sum(1), (targets >= 0).sum(1)


def _positions(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Positions of (B, T) ids, where the model takes them.

    They are expanded: GPT-2 otherwise embeds them once for all records, and no per-record gradient
    of the position embedding exists.
    """
    if not takes_positions(model):
        return {}
    positions = torch.arange(ids.shape[1], device=ids.device)
    return {"position_ids": positions.expand_as(ids)}


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each token, (n, vocabulary) and (n,) -> (n,) float32; 0 without a target.

    The layout matters. With transposed logits, (B, vocabulary, T), it takes seven times as long on
    a CPU. In pieces that fit the caches it takes 0.6 times as long as in one.
    """
    values = values_at_once(logits.device, _CPU_VALUES, _DEVICE_VALUES)
    rows = max(1, values // logits.shape[1])
    return torch.cat(
        [
            cross_entropy(part.float(), wanted, ignore_index=NO_TARGET, reduction="none")
            for part, wanted in zip(
                torch.split(logits, rows), torch.split(targets, rows), strict=True
            )
        ]
    )


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    records: torch.Tensor,
    micro_batch: int = MEASURED_RECORDS,
    on_progress: Callable[[], None] = lambda: None,
    precision: Precision | None = None,
    losses_of_records: RecordLosses = record_losses,
) -> float:
    """Compute the mean loss in nats per token.

    Args:
        model: causal language model; its mode is restored.
        records: (records, tokens) int64, any device; filled up as for `record_losses`.
        micro_batch: records per forward pass.
        on_progress: called after each forward pass.
        precision: of the passes; None = bfloat16 on a GPU that has it.
        losses_of_records: the loss, e.g. of `choose_losses`.

    Raises:
        ConfigError: there is no token to predict.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    size, rest = max(1, micro_batch), records
    nats, tokens = 0.0, 0

    def losses_of_next() -> tuple[float, int]:
        with autocast(device) if precision is None else precision.context():
            losses, counted = losses_of_records(model, rest[:size].to(device))
        return float(losses.cpu().double().sum()), int(counted.sum())

    def shrink() -> str:
        nonlocal size
        size, words = halved(size)
        return words

    try:
        while len(rest):
            more, counted = until_it_fits(losses_of_next, shrink)
            nats, tokens, rest = nats + more, tokens + counted, rest[size:]
            on_progress()
    finally:
        model.train(was_training)
    if tokens == 0:
        raise ConfigError("no text to measure a loss on", "give a longer text")
    return nats / tokens


def transformers_model(model: torch.nn.Module) -> Any:
    """Return the transformers model in a wrapper such as peft's, or the model itself."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise LocalError(f"{type(model).__name__} holds no transformers model")


def takes_positions(model: torch.nn.Module) -> bool:
    """Whether a transformers model takes `position_ids`."""
    return _has_positions(type(model).forward)


@functools.cache
def _has_positions(forward: Callable[..., Any]) -> bool:
    return "position_ids" in inspect.signature(forward).parameters
