"""Text from the gradient of one record: what a partner could read out of a single step.

The gradient of a linear layer is spanned by its inputs, so whoever knows the parameters can test
which inputs were there (DAGER, Petrov et al. 2024, arXiv:2405.15586, sections 4.1 and 4.2): the
first layer's inputs are tokens, the next one's are tokens after a prefix, and the text comes out
byte by byte. Nothing is optimised, and without noise nothing is guessed.

Kindest to the attacker: a shard of one record, one step, the gradient itself sent in float32 (as
`round.rule = gradient` does), the parameters known.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from pathlib import Path
from typing import Any, Final

import torch
from msgspec import Struct

from benchmarks.privacy import setting
from benchmarks.privacy.ledgers import open_ledger
from benchmarks.privacy.utility import model_with
from xpeer.privacy.mechanism import OffMechanism, RecordMechanism
from xpeer.training.losses import record_losses

BYTES: Final = 256
_NOTHING: Final = 1e-6
"""Singular values below this share of the largest are rounding."""
_BEAM: Final = 4
_SAME: Final = 1e-5
_REPEATED: Final = 1e-2
"""Added where a position repeats an earlier one's input, which is spanned without being there: "aa"
gives what "a" gave. Much less than what a wrong byte costs, more than rounding."""


class Inversion(Struct, frozen=True, kw_only=True, tag=True):
    """The attack on a few records, one at a time."""

    epsilon: float | None
    records: int = 8
    start_steps: int = setting.START_STEPS

    def figures(self) -> dict[str, Any]:
        """Shares recovered, averaged over records; and what guessing without a gradient gives."""
        start = setting.public_start(0, self.start_steps)
        texts = setting.held_out()[1]
        texts = texts[torch.linspace(0, len(texts) - 1, self.records).long()]
        common = torch.bincount(setting.held_out()[0].flatten(), minlength=BYTES)
        found: dict[str, list[float]] = {"bytes": [], "text": [], "chance_bytes": []}
        chance: list[float] = []
        examples = []
        for text in texts:
            model = model_with(start)
            self._step(model, text[None])
            told = text[:-1]  # the last byte is predicted, never an input
            there = set(told.tolist())
            order = _tokens(model)
            found["bytes"].append(_share(set(order[: len(there)]), there))
            usual = common.argsort(descending=True)
            found["chance_bytes"].append(_share(set(usual[: len(there)].tolist()), there))
            guess = _read(model, order[: len(there) + 4], len(told))
            found["text"].append(float((guess == told).float().mean()))
            chance.append(float((told == usual[0]).float().mean()))
            examples.append([_printed(told), _printed(guess)])
        figures: dict[str, Any] = {name: statistics.fmean(each) for name, each in found.items()}
        return figures | {"chance_text": statistics.fmean(chance), "example": examples[0]}

    def _step(self, model: torch.nn.Module, record: torch.Tensor) -> None:
        """Leave the gradient that is sent."""
        manifest = setting.manifest_of(self.epsilon, rate=1.0, batch=1, steps=1, rule="gradient")
        if self.epsilon is None:
            OffMechanism(manifest, model, record, record_losses).step_gradient()
            return
        with tempfile.TemporaryDirectory() as folder, open_ledger(Path(folder), manifest) as ledger:
            mechanism = RecordMechanism(manifest, model, record, record_losses, ledger)
            mechanism.charge_until(1)
            mechanism.step_gradient()
            mechanism.close()


@torch.no_grad()
def _spanned(gradient: torch.Tensor, most: int) -> torch.Tensor:
    """Basis of a linear layer's inputs, (r, width) float64, from its gradient (out, width)."""
    _, sizes, basis = torch.linalg.svd(gradient.double(), full_matrices=False)
    rank = int((sizes > _NOTHING * sizes[0]).sum())
    found: torch.Tensor = basis[: min(rank, most)]
    return found


def _outside(inputs: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Share of each input that the basis does not span, (n,)."""
    inputs = inputs.double()
    rest = inputs - inputs @ basis.T @ basis
    outside: torch.Tensor = rest.norm(dim=-1) / inputs.norm(dim=-1)
    return outside


@torch.no_grad()
def _tokens(model: Any) -> list[int]:
    """All bytes, those first that were rather in the record."""
    first = model.model.layers[0]
    inputs = first.input_layernorm(model.model.embed_tokens.weight[:BYTES])
    basis = _spanned(first.self_attn.v_proj.weight.grad, setting.RECORD_TOKENS // 2)
    order: list[int] = _outside(inputs, basis).argsort().tolist()
    return order


@torch.no_grad()
def _read(model: Any, candidates: list[int], length: int) -> torch.Tensor:
    """The text, (length,) int64: beginnings whose inputs of the first perceptron were all there."""
    basis = _spanned(model.model.layers[0].mlp.gate_proj.weight.grad, setting.RECORD_TOKENS - 1)
    choices = torch.tensor(candidates)
    beams, costs = torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    for _ in range(length):
        longer = torch.cat(
            [beams.repeat_interleave(len(choices), 0), choices.repeat(len(beams))[:, None]], dim=1
        )
        inputs, again = _perceptron_inputs(model, longer)
        totals = costs.repeat_interleave(len(choices)) + _outside(inputs, basis)
        totals += _REPEATED * again
        kept = totals.argsort()[:_BEAM]
        beams, costs = longer[kept], totals[kept]
    return beams[0]


class _EnoughError(Exception):
    """The first perceptron was reached."""


def _perceptron_inputs(model: Any, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the first perceptron sees at the last position, (n, T) to (n, width); and whether an
    earlier position shows it the same.
    """
    seen: list[torch.Tensor] = []

    def note(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        seen.append(output)
        raise _EnoughError

    hook = model.model.layers[0].post_attention_layernorm.register_forward_hook(note)
    try:
        with contextlib.suppress(_EnoughError):
            model.model(input_ids=texts, use_cache=False)
    finally:
        hook.remove()
    unit = torch.nn.functional.normalize(seen[0], dim=-1)
    alike = (unit[:, :-1] @ unit[:, -1:].transpose(1, 2)).squeeze(-1)  # (n, T - 1)
    return seen[0][:, -1], (alike > 1 - _SAME).any(dim=1)


def _share(guessed: set[int], there: set[int]) -> float:
    return len(guessed & there) / len(there)


def _printed(text: torch.Tensor) -> str:
    return bytes(text.tolist()).decode("latin-1")
