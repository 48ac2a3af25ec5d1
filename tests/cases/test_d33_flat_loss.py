"""The loss reads logits in the order in which the model wrote them, and in pieces."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from xpeer.training import losses
from xpeer.training.model import build

CONFIG = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 49_152,
    "max_position_embeddings": 64,
}  # fmt: skip


def test_the_loss_of_a_large_vocabulary_is_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    layouts: list[tuple[int, bool]] = []
    real = torch.nn.functional.cross_entropy

    def watched(logits: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        layouts.append((logits.dim(), logits.is_contiguous()))
        return real(logits, *rest, **more)

    monkeypatch.setattr(losses, "cross_entropy", watched)
    model, ids = build(CONFIG, seed=1), torch.randint(0, 49_152, (6, 64))
    loss: Any = losses.record_losses
    padding = [49_151] if "pad_id" in inspect.signature(loss).parameters else []  # of the past
    loss(model, ids, *padding)
    assert set(layouts) == {(2, True)}
    assert len(layouts) > 1
