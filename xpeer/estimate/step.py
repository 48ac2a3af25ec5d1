"""The memory of one training step: found by a rehearsal of the step's own code, without values.

All layers are rehearsed. Two small numbers of layers and their difference would take a fraction of
the time, and be wrong: which moment needs most depends on how many layers there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn

from xpeer.estimate.live import Rehearsal
from xpeer.manifest.model import BASE_BLOCK, BaseDtype, Lora
from xpeer.privacy.clipping import BookKeepingEngine, trainable
from xpeer.privacy.steps import Switchable
from xpeer.training.adapters import adapt
from xpeer.training.held import DTYPES, hold
from xpeer.training.losses import choose_losses
from xpeer.training.model import skeleton
from xpeer.training.precision import Wanted, choose_precision
from xpeer.training.quantised import Shapes, num_values, quantise, saved_bytes
from xpeer.training.recompute import Recomputing

_CPU: Final = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Step:
    """What decides the memory of a step."""

    config: dict[str, Any]
    """The model's, as in the manifest."""
    lora: Lora | None = None
    base_dtype: BaseDtype = "float32"
    sequence_tokens: int
    micro_batch: int
    """Records of a pass."""
    private: bool
    precision: Wanted = "float32"
    recompute: bool = False
    """Whether layers are computed again in the backward pass."""


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Memory of a step on its device, in bytes."""

    num_trained: int
    """Trained parameters. This and the next are numbers, not bytes."""
    num_frozen: int
    weights: int
    """All weights and buffers, frozen ones included."""
    source: int
    """The same before anything is quantised: what a start reads, and a merged export writes."""
    moments: int
    """AdamW's two."""
    working: int
    """Gradients, activations and all else, at the peak of a step."""

    @property
    def peak(self) -> int:
        """All of it."""
        return self.weights + self.moments + self.working


def memory_of(step: Step) -> StepMemory:
    """Rehearse a step, and count its memory. Takes seconds for each ten layers.

    Raises:
        ConfigError: the model can't be built, or its layers can't be computed again.
    """
    model = hold(skeleton(step.config), DTYPES[step.base_dtype])
    model = quantise(model, step.base_dtype, BASE_BLOCK, Shapes())
    model = model.train() if step.lora is None else adapt(model, step.lora)
    kept = 0
    with Rehearsal() as memory:

        def begin() -> None:
            nonlocal kept
            kept = memory.live_bytes
            memory.begin()

        _come_alive(model)
        weights = memory.live_bytes
        take(step, model, begin)
        working = memory.peak_bytes - kept
    count = sum(p.numel() for p in model.parameters()) + num_values(model)
    num_trained = sum(p.numel() for p in trainable(model))
    return StepMemory(
        num_trained=num_trained,
        num_frozen=count - num_trained,
        weights=weights,
        source=weights + saved_bytes(model),
        moments=kept - weights,
        working=working,
    )


def take(step: Step, model: nn.Module, begin: Callable[[], None]) -> None:
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
        self.losses.precision = choose_precision(self.step.precision, _CPU)[0]
        if self.step.recompute:
            Recomputing(self.model).require()

    def run(self) -> None:
        """Set the gradients; two passes, since the second adds to what the first left."""
        size = self.step.micro_batch, self.step.sequence_tokens
        records = torch.zeros(size, dtype=torch.int64)
        if self.step.private:
            sums = []
            for parameter in self.trained:
                parameter.grad = torch.zeros_like(parameter)
                sums.append(parameter.grad)
            engine = BookKeepingEngine(self.model, self.losses, micro_batch=len(records))
            for _ in range(2):
                engine.accumulate(records, 1.0, sums)
            return
        for _ in range(2):
            nats, _counts = self.losses(self.model, records)
            torch.autograd.backward(nats.sum())
