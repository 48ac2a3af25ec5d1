"""What founding holds while it measures a model: never all logits, and one record at a time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.privacy.alive import Alive
from xpeer.drafting import draft_manifest
from xpeer.founding_model import INITIAL_RECORDS, InitialModel, LoraOptions, initial_model
from xpeer.manifest import Manifest
from xpeer.training import head, losses, placed
from xpeer.training.document import document_of
from xpeer.training.measuring import spread
from xpeer.training.records import cut
from xpeer.training.tokenizer import ByteTokenizer

LENGTH, VOCABULARY = 64, 4096
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2", "vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 1, "n_head": 2,
        "n_positions": 100, "bos_token_id": 0, "eos_token_id": 1,
    },
    "llama": {
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1,
        "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1,
        "max_position_embeddings": 100, "tie_word_embeddings": False,
    },
}  # fmt: skip


def drawn(folder: Path, family: str, lora: LoraOptions | None = None) -> InitialModel:
    file = folder / "config.json"
    file.write_text(json.dumps(CONFIGS[family]))
    return initial_model(None, file, None, lora)


def draft(source: InitialModel, folder: Path, device: str = "cpu") -> Manifest:
    text = folder / "public.txt"
    text.write_text("a public text, which everybody may read. " * 20)
    changes = [f"optimiser.sequence_tokens={LENGTH}", "end.steps=1"]
    return draft_manifest(
        "s", source, tokenizer=None, public_text=text, changes=changes, device=device
    )


def loss_at_once(source: InitialModel, manifest: Manifest) -> float:
    document = document_of(manifest.public_text.text, "public text")
    records = spread(cut([document], ByteTokenizer(), LENGTH), INITIAL_RECORDS)
    return losses.evaluate(source.module, records)


@pytest.mark.parametrize("lora", [None, LoraOptions(2)], ids=["whole", "adapters"])
@pytest.mark.parametrize("family", CONFIGS)
def test_never_all_logits_of_a_record(
    family: str, lora: LoraOptions | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss, the search for what no text reaches, and its check."""
    monkeypatch.setattr(head, "_CPU_LOGITS", 4 * VOCABULARY)
    monkeypatch.setattr(head, "_CPU_LOGITS_FROZEN", 4 * VOCABULARY)
    source = drawn(tmp_path, family, lora)
    with Alive() as memory:
        made = draft(source, tmp_path)
    assert memory.peak < 0.8 * 4 * LENGTH * VOCABULARY, memory.peak / (4 * LENGTH * VOCABULARY)
    assert made.public_text.initial_loss == pytest.approx(loss_at_once(source, made), rel=1e-5)


def test_the_loss_is_measured_on_the_gpu_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, asked = drawn(tmp_path, "llama"), []

    def choose(name: str) -> tuple[torch.device, str]:
        asked.append(name)
        return torch.device("cuda"), ""

    @contextlib.contextmanager
    def on_device(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
        assert model is source.module
        asked.append(device.type)
        yield

    monkeypatch.setattr(losses, "choose_device", choose)
    monkeypatch.setattr(placed, "on_device", on_device)
    made = draft(source, tmp_path, "auto")
    assert asked == ["auto", "cuda"]
    assert made.public_text.initial_loss == pytest.approx(loss_at_once(source, made), rel=1e-5)
