"""D03: adapters on a tied output were merged into the input embedding, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.cases.homes import export, found_here, logits, train
from tests.cases.support import model_folder, tokenizer_folder

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
LOUD = ("optimiser.learning_rate=0.3", "optimiser.warmup_steps=0")


def adapted_home(tmp_path: Path, shard: Path, model: Path, *targets: str) -> Path:
    tokens = tokenizer_folder(tmp_path / "tokenizer")
    wanted = [part for target in targets for part in ("--lora-target", target)]
    home = tmp_path / "home"
    found_here(
        home, shard, "--model", model, "--tokenizer", tokens, "--lora-rank", "4", *wanted,
        fields=LOUD,
    )  # fmt: skip
    train(home, 3)
    return home


def exports(tmp_path: Path, home: Path, model: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the base with adapters, and of the merged model, as users load them."""
    from peft import PeftModel

    base: Any = AutoModelForCausalLM.from_pretrained(model)
    before = logits(base)
    adapters = PeftModel.from_pretrained(base, export(home, tmp_path / "adapters"))
    expected = logits(adapters)
    assert float((expected - before).abs().max()) > 0.05  # the adapters do something
    merged = AutoModelForCausalLM.from_pretrained(export(home, tmp_path / "whole", "--merged"))
    return expected, logits(merged)


def assert_equal(expected: torch.Tensor, merged: torch.Tensor) -> None:
    """But for what float32 loses where a product is added to a weight; noise made some large."""
    apart = float((expected - merged).abs().max())
    assert apart < 1e-3 * max(1.0, float(expected.abs().max()))


def test_a_merged_export_of_a_tied_model_is_what_was_trained(tmp_path: Path, shard: Path) -> None:
    model = model_folder(tmp_path / "model", "gpt2")
    home = adapted_home(tmp_path, shard, model, "lm_head")
    expected, merged = exports(tmp_path, home, model)
    assert_equal(expected, merged)
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("family", "more", "targets"),
    [
        ("gpt2", {}, ()),  # Conv1D: transposed weights and biases, all of them
        ("gpt2", {"tie_word_embeddings": False}, ("lm_head", "c_attn")),
        ("llama", {"tie_word_embeddings": True}, ("lm_head", "q_proj")),
        ("gemma", {"head_dim": 8}, ("lm_head", "down_proj")),
    ],
)
def test_merged_adapters_of_all_kinds(
    tmp_path: Path, shard: Path, family: str, more: dict[str, Any], targets: tuple[str, ...]
) -> None:
    model = model_folder(tmp_path / "model", family, **more)
    home = adapted_home(tmp_path, shard, model, *targets)
    expected, merged = exports(tmp_path, home, model)
    assert_equal(expected, merged)
