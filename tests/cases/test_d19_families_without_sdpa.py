"""D19: families without torch's fused attention were refused as if they were no language models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cases.homes import call
from tests.cases.support import LOOPBACK, SMALL, sets

WIDE = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 128,
}  # fmt: skip
GPTJ = {
    "vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4,
}  # fmt: skip


def init(tmp_path: Path, config: dict[str, Any]) -> tuple[int, str]:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    done = call(
        "init", "--swarm", "s", "--home", tmp_path / "home", "--listen", LOOPBACK,
        "--model-config", file, *sets(*SMALL, "end.steps=20"),
    )  # fmt: skip
    return done.exit_code, done.output


@pytest.mark.parametrize("kind", ["gemma2", "gptj"])
def test_families_with_an_attention_of_their_own_are_founded(tmp_path: Path, kind: str) -> None:
    code, said = init(tmp_path, {"model_type": kind, **(GPTJ if kind == "gptj" else WIDE)})
    assert code == 0, said


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "t5", "vocab_size": 320}, "no causal language model of type t5"),
        ({"model_type": "vit", "vocab_size": 320}, "no causal language model of type vit"),
        ({"model_type": "bert", **WIDE}, "looks at the tokens that it has to predict"),
        # heads of queries are no multiple of those of keys: built, but it does not run
        ({"model_type": "llama", **WIDE, "num_key_value_heads": 3}, "does not run"),
    ],
)
def test_what_is_refused_is_refused_with_the_true_reason(
    tmp_path: Path, config: dict[str, Any], reason: str
) -> None:
    code, said = init(tmp_path, config)
    assert code == 8
    assert reason in said
    assert not (tmp_path / "home").exists()
