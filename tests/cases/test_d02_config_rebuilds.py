"""D02: what was loaded is what the config that is signed builds again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from tests.cases.support import model_folder, xpeer
from xpeer.cli import main

Weights = dict[str, torch.Tensor]


def altered(
    folder: Path, config: dict[str, Any], weights: Callable[[Weights], Weights] | None = None
) -> Path:
    """The folder with keys of its config.json, or its weights, changed."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    if weights is not None:
        held = folder / "model.safetensors"
        save_file(weights(load_file(held)), held, metadata={"format": "pt"})
    return folder


def test_untied_weights_under_a_config_that_ties_them(tmp_path: Path) -> None:
    model = altered(
        model_folder(tmp_path / "m", tie_word_embeddings=False), {"tie_word_embeddings": True}
    )
    done = xpeer("init", "--swarm", "s", "--home", tmp_path / "h", "--model", model)
    assert done.returncode == 8, "it was founded, and could never be started again"
    assert "config.json says tie_word_embeddings = true" in done.stderr
    assert "tie_word_embeddings = false" in done.stderr
    assert not (tmp_path / "h").exists()


def refused(tmp_path: Path, model: Path) -> str:
    done = CliRunner().invoke(
        main, ["init", "--swarm", "s", "--home", str(tmp_path / "h"), "--model", str(model)]
    )
    assert done.exit_code == 8, done.output
    assert done.stderr.startswith("xpeer: error: --model") or f"model {model}" in done.stderr
    assert len(done.stderr.splitlines()) == 1, "one line, and none of transformers' tables"
    assert not (tmp_path / "h").exists()
    return str(done.stderr)


OTHER: dict[str, tuple[str, dict[str, Any], dict[str, Any], list[str]]] = {
    "tied weights, untied config": (
        "llama", {"tie_word_embeddings": True}, {"tie_word_embeddings": False},
        ["tie_word_embeddings = false", "lack lm_head.weight"],
    ),
    "tied by default": (
        "gpt2", {}, {"tie_word_embeddings": False}, ["tie_word_embeddings = false"],
    ),
    "resized": ("llama", {}, {"vocab_size": 310}, ["vocab_size = 310", "300 x 32"]),
    "resized, GPT-2": ("gpt2", {}, {"vocab_size": 299}, ["vocab_size = 299", "300 x 32"]),
    "fewer layers": ("llama", {}, {"num_hidden_layers": 1}, ["num_hidden_layers = 1", "2 layers"]),
    "more layers": ("llama", {}, {"num_hidden_layers": 3}, ["num_hidden_layers = 3", "2 layers"]),
    "GPT-2's name": ("gpt2", {}, {"n_layer": 1}, ["n_layer = 1", "2 layers"]),
    "positions": ("gpt2", {}, {"n_positions": 64}, ["n_positions = 64", "128 x 32"]),
    "heads": ("llama", {}, {"num_key_value_heads": 4}, ["num_key_value_heads = 4", "16 x 32"]),
    "width": ("llama", {}, {"intermediate_size": 64}, ["intermediate_size = 64", "48"]),
    "biases": (
        "llama", {"attention_bias": True}, {"attention_bias": False},
        ["attention_bias = false", "_proj.bias"],
    ),
    "another family": ("llama", {}, {"model_type": "qwen2"}, ["_proj.bias"]),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER)
def test_a_config_that_differs_from_its_weights(tmp_path: Path, case: str) -> None:
    family, made, said, told = OTHER[case]
    line = refused(tmp_path, altered(model_folder(tmp_path / "m", family, **made), said))
    assert all(part in line for part in told), line


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        (lambda t: t | {"lm_head.bias": torch.ones(300)}, "lm_head.bias"),
        (lambda t: t | {"score.weight": torch.ones(2, 32)}, "score.weight"),
        (lambda t: t | {"v_head.summary.weight": torch.ones(1, 32)}, "v_head"),
        (lambda t: {k: v.to(torch.int8) for k, v in t.items()}, "of type I8"),
        (lambda t: t | {"lm_head.weight": torch.full((300, 32), torch.inf)}, "lm_head.weight"),
        (lambda t: {f"x.{k}": v for k, v in t.items()}, "x.lm_head.weight"),
    ],
)
def test_weights_that_the_config_has_no_place_for(
    tmp_path: Path, weights: Callable[[Weights], Weights], told: str
) -> None:
    assert told in refused(tmp_path, altered(model_folder(tmp_path / "m"), {}, weights))


@pytest.mark.parametrize(
    ("config", "weights"),
    [
        ({"dtype": "float16"}, lambda t: {k: v.half() for k, v in t.items()}),
        ({}, lambda t: {k.removeprefix("model."): v for k, v in t.items()}),
        ({}, lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
        ({"architectures": ["LlamaForSequenceClassification"]}, None),
    ],
)
def test_what_is_no_difference(
    tmp_path: Path, config: dict[str, Any], weights: Callable[[Weights], Weights] | None
) -> None:
    from xpeer.founding_model import initial_model

    made = initial_model(altered(model_folder(tmp_path / "m"), config, weights), None, None)
    assert made.num_params == 34_720
