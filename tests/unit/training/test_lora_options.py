"""Layers that get adapters, by name and by pattern."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from tests.unit.training.test_adapters import LORA, tiny
from xpeer.cli import main
from xpeer.errors import ConfigError
from xpeer.manifest import SignedManifest
from xpeer.training import adapters, targets
from xpeer.training.model import export_hf

BASE = "model.layers.0.self_attn."


@pytest.mark.parametrize(
    ("given", "found", "count"),
    [
        ([], [], 14),
        (["all-linear"], [], 14),
        (["v_proj", "q_proj", "q_proj"], ["q_proj", "v_proj"], 4),
        (["layers.0.self_attn.q_proj"], [f"{BASE}q_proj"], 1),
        ([r".*layers\.0\..*(q|v)_proj"], [f"{BASE}q_proj", f"{BASE}v_proj"], 2),
        ([r".*\.(q|v)_proj"], ["q_proj", "v_proj"], 4),
    ],
)
def test_layers_by_name_or_pattern(given: list[str], found: list[str], count: int) -> None:
    model = tiny()
    assert targets.find(model, given) == found
    adapted = adapters.adapt(model, msgspec.structs.replace(LORA, targets=found))
    layers = {n.partition(".lora_")[0] for n, _ in adapted.named_parameters() if ".lora_A." in n}
    assert len(layers) == count


@pytest.mark.parametrize("wrong", ["nothing", "proj", ".*nothing.*", "embed_tokens"])
def test_an_unknown_layer_is_answered_with_those_that_there_are(wrong: str) -> None:
    with pytest.raises(ConfigError, match="it has down_proj \\(2\\), gate_proj \\(2\\)") as raised:
        targets.find(tiny(), ["q_proj", wrong])
    assert repr(wrong) in raised.value.problem
    with pytest.raises(ConfigError, match="no regular expression"):
        targets.find(tiny(), ["*q_proj"])


def init(home: Path, *more: object) -> Result:
    command = ["init", "--home", str(home), "--swarm", "s", *map(str, more)]
    return CliRunner().invoke(main, command, catch_exceptions=False)


def test_found_with_these_layers(tmp_path: Path) -> None:
    export_hf(tiny(), None, tmp_path / "base")
    made = init(tmp_path / "one", "--model", tmp_path / "base", "--lora-rank", 2,
                "--lora-target", "q_proj,v_proj", "--lora-target", r".*layers\.1\.mlp\..*",
                "--skip-trial")  # fmt: skip
    assert made.exit_code == 0, made.stderr
    lora = SignedManifest.load(tmp_path / "one" / "manifest.json").open().model.lora
    assert lora is not None
    mlp = [f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")]
    assert lora.targets == ["q_proj", "v_proj", *mlp]
