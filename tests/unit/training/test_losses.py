"""The loss against a plain one, alone and in every engine that clips; those against opacus, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.opacus_reference import clipped_by_opacus
from xpeer.privacy.clipping import (
    BookKeepingEngine,
    FunctionalEngine,
    MicrobatchEngine,
    trainable,
)
from xpeer.training import losses
from xpeer.training.losses import record_losses
from xpeer.training.model import build
from xpeer.training.records import FILL

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 40, "pad_token_id": 1,
    "max_position_embeddings": 16, "eos_token_id": 1, "tie_word_embeddings": True,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16,
    "vocab_size": 40, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip
ENGINES: list[Any] = [BookKeepingEngine, FunctionalEngine, MicrobatchEngine]


@pytest.fixture(autouse=True)
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several to a record, one of them smaller."""
    torch.set_num_threads(1)
    monkeypatch.setattr(losses, "_CPU_VALUES", 5 * 40)


def records() -> torch.Tensor:
    """Of 12, 7 and 2 tokens; all hold id 1, which is the padding of the configs."""
    made = torch.randint(0, 40, (3, 12), generator=torch.Generator().manual_seed(1))
    made[:, 1] = 1
    made[0, 11] = made[1, 6] = 1
    made[1, 7:] = made[2, 2:] = FILL
    return made


def plainly(model: torch.nn.Module, record: torch.Tensor) -> torch.Tensor:
    """Without anything filled up."""
    ids = record[record >= 0][None]
    logits = model(input_ids=ids).logits[0, :-1]
    return cross_entropy(logits, ids[0, 1:], reduction="sum")


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_equals_the_plain_loss_of_what_is_not_filled_up(config: dict[str, Any]) -> None:
    model = build(config, seed=1)
    found, counted = record_losses(model, records())
    wanted = torch.stack([plainly(model, record) for record in records()])
    assert counted.tolist() == [11, 6, 1]
    torch.testing.assert_close(found, wanted)
    got = torch.autograd.grad(found.sum(), trainable(model))
    for mine, plain in zip(got, torch.autograd.grad(wanted.sum(), trainable(model)), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_every_engine_clips_it_exactly(config: dict[str, Any], engine: Any) -> None:
    model = build(config, seed=1)
    parameters = trainable(model)
    norms, sums = [], [torch.zeros_like(p) for p in parameters]
    for record in records():
        mean = plainly(model, record) / (int((record >= 0).sum()) - 1)
        grads = torch.autograd.grad(mean, parameters)
        norms.append(float(torch.stack([g.square().sum() for g in grads]).sum().sqrt()))
        for total, grad in zip(sums, grads, strict=True):
            total.add_(grad * min(1.0, 0.8 / norms[-1]))
    got = [torch.zeros_like(p) for p in parameters]
    told = engine(model, record_losses).accumulate(records(), 0.8, got)
    assert told.norms.tolist() == pytest.approx(norms, rel=1e-4)
    assert told.tokens.tolist() == [11, 6, 1]
    found, theirs = clipped_by_opacus(model, record_losses, records(), 0.8)
    assert told.norms.tolist() == pytest.approx(found.tolist(), rel=1e-4)
    for mine, plain, opacus in zip(got, sums, theirs, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(mine, opacus, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_token_that_is_only_read_changes_what_follows_and_is_not_predicted(
    config: dict[str, Any],
) -> None:
    """A number below -1 is such a token: -2 - token. So are the first 5 of 12 here, and the 9th."""
    model = build(config, seed=1)
    text = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(2))
    only_read = torch.tensor([True] * 5 + [False] * 3 + [True] + [False] * 3)
    marked = text.where(~only_read, -2 - text)
    found, counted = record_losses(model, marked)
    logits = model(input_ids=text[:, :-1]).logits
    each = cross_entropy(logits.transpose(1, 2), text[:, 1:], reduction="none")
    assert counted.tolist() == [6, 6]
    torch.testing.assert_close(found, (each * ~only_read[1:]).sum(1))
    other = marked.clone()
    other[:, 0] = -2 - (text[:, 0] + 1) % 40
    assert not torch.allclose(record_losses(model, other)[0], found)


def test_a_measurement_without_memory_takes_fewer_records_at_a_time() -> None:
    sizes = []

    def small(model: torch.nn.Module, some: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(len(some))
        if len(some) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return record_losses(model, some)

    model, text = build(LLAMA, seed=1), records().repeat(2, 1)
    found = losses.evaluate(model, text, losses_of_records=small)
    assert found == pytest.approx(losses.evaluate(model, text), rel=1e-6)
    assert sizes == [6, 6, 4, 2, 2, 2]  # tried with 16, 8, 4 and 2 at most
    assert model.training
