"""The memory of one training step: found by a rehearsal of the step's own code, without values.

All layers are rehearsed. Two small numbers of layers and their difference would take a fraction of
the time, and be wrong: which moment needs most depends on how many layers there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from msgspec import Struct
from torch import nn

from xpeer.estimate.live import Rehearsal
from xpeer.leaves import seen_by
from xpeer.manifest.model import BASE_BLOCK, BaseDtype, Frozen, Lora
from xpeer.privacy import noise
from xpeer.privacy.at_once import DeviceKind, rehearsed_as
from xpeer.privacy.clipping import BookKeepingEngine, trainable
from xpeer.privacy.steps import Switchable
from xpeer.training.adapters import adapt
from xpeer.training.frozen import freeze
from xpeer.training.held import DTYPES, hold
from xpeer.training.losses import choose_losses
from xpeer.training.model import skeleton
from xpeer.training.precision import choose_precision
from xpeer.training.quantised import Shapes, num_values, quantise, saved_bytes
from xpeer.training.recompute import Recomputing

FROZEN_BYTES: Final[dict[BaseDtype, float]] = {
    "float32": 4.0, "bfloat16": 2.0, "int8": 1.0625, "nf4": 0.5625,
}  # fmt: skip
"""Of a frozen value. Embeddings, norms and biases may take more."""
_CPU: Final = torch.device("cpu")
Precision = Literal["float32", "bfloat16"]
"""In what a step computes. `training.precision = auto` is one of these on each device."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What decides the memory of a step."""

    config: dict[str, Any]
    """The model's, as in the manifest."""
    lora: Lora | None = None
    frozen: Frozen | None = None
    """Parameters that no text reaches, as in the manifest."""
    base_dtype: BaseDtype = "float32"
    sequence_tokens: int
    micro_batch: int
    """Records of a pass."""
    private: bool
    precision: Precision = "float32"
    recompute: bool = False
    """Whether layers are computed again in the backward pass."""
    device: DeviceKind = "cpu"
    """It decides how much is computed at once."""


@seen_by("home", "of the manifest and the operator's settings", all_public=True)
class StepMemory(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Memory of a step on its device, in bytes."""

    num_trained: int
    """Trained parameters. This and the next are numbers, not bytes."""
    num_frozen: int
    weights: int
    """All weights and buffers, frozen ones included."""
    moments: int
    """AdamW's two."""
    working: int
    """Gradients, activations and all else, at the peak of a step."""
    saved: int = 0
    """By which codes and scales of quantised matrices are less than these in 16 bits."""

    @property
    def source(self) -> int:
        """Weights before anything is quantised: what a start reads, and a merged export writes."""
        return self.weights + self.saved

    @property
    def peak(self) -> int:
        """All of it."""
        return self.weights + self.moments + self.working

    @property
    def least(self) -> int:
        """What no number of records and no precision changes: weights, moments, gradients."""
        return self.weights + self.moments + 4 * self.num_trained


def memory_of(step: Step, on_operation: Callable[[], None] = lambda: None) -> StepMemory:
    """Rehearse a step, and count its memory. Takes seconds for each ten layers.

    Args:
        step: says how.
        on_operation: called at each operation, as a sign of life.

    Raises:
        ConfigError: the model can't be built, or its layers can't be computed again.
    """
    model = hold(skeleton(step.config), DTYPES[step.base_dtype])
    model = quantise(model, step.base_dtype, BASE_BLOCK, Shapes())
    model = model.train() if step.lora is None else adapt(model, step.lora)
    count = sum(p.numel() for p in model.parameters()) + num_values(model)
    freeze(model, step.frozen)
    cut_out = count - num_values(model) - sum(p.numel() for p in model.parameters())
    kept = 0
    with (
        torch.random.fork_rng(devices=[]),
        rehearsed_as(step.device),
        Rehearsal(on_operation) as memory,
    ):

        def begin() -> None:
            nonlocal kept
            kept = memory.live_bytes
            memory.begin()

        _come_alive(model)
        weights = memory.live_bytes
        take(step, model, begin)
        working = memory.peak_bytes - kept
    num_trained = sum(p.numel() for p in trainable(model))
    return StepMemory(
        num_trained=num_trained,
        num_frozen=count - num_trained,
        weights=weights + 4 * cut_out,
        saved=saved_bytes(model),
        moments=kept - weights,
        working=working,
    )


def take(step: Step, model: nn.Module, begin: Callable[[], object]) -> None:
    """Take a step as the trainer does, from zero moments on.

    Args:
        step: says how.
        model: the step's, on its device; in a rehearsal, or a real one to be measured.
        begin: called when the moments are there, and the step begins.
    """
    trained = trainable(model)
    optimiser = torch.optim.AdamW(trained, fused=True)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    for parameter in trained:
        parameter.grad = None
    computing = _Pass(step, model, trained)
    begin()
    computing.run()
    optimiser.step()


def _come_alive(model: nn.Module) -> None:
    """Give all parameters and buffers memory that counts; tied ones stay tied."""
    alive: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for module in model.modules():
        for kept in (module._parameters, module._buffers):
            for name, tensor in kept.items():
                if tensor is None:
                    continue
                if id(tensor) not in alive:  # with the old one: its id must not be used again
                    alive[id(tensor)] = tensor, _alive(tensor)
                kept[name] = alive[id(tensor)][1]  # type: ignore[assignment] # as it was


def _alive(tensor: torch.Tensor) -> torch.Tensor:
    new = torch.empty(tensor.shape, dtype=tensor.dtype, device=_CPU)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(new, requires_grad=tensor.requires_grad)
    return new


@dataclass
class _Pass:
    """Computes a gradient as the mechanisms do."""

    step: Step
    model: nn.Module
    trained: Sequence[nn.Parameter]
    losses: Switchable = field(init=False)

    def __post_init__(self) -> None:
        self.losses = Switchable(choose_losses(self.model)[0])
        self.losses.precision = choose_precision(self.step.precision, self.trained[0].device)[0]
        if self.step.recompute:
            Recomputing(self.model).require()

    def run(self) -> None:
        """Add a pass to gradients that are there: a pass needs most when it is not the first."""
        size = self.step.micro_batch, self.step.sequence_tokens
        records = torch.zeros(size, dtype=torch.int64, device=self.trained[0].device)
        sums = []
        for parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter)
            sums.append(parameter.grad)
        if self.step.private:
            engine = BookKeepingEngine(self.model, self.losses, micro_batch=len(records))
            engine.accumulate(records, 1.0, sums)
            del engine
            if self.step.device != "cpu":
                noise.take_room(sums)
            return
        nats, _counts = self.losses(self.model, records)
        torch.autograd.backward(nats.sum())
