"""D19: messages that send people elsewhere: name the tensor, the option, the place."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.cases.support import LOOPBACK, model_folder


def init(home: Path, *arguments: str | Path) -> Result:
    from xpeer.cli import main

    words = ["init", "--swarm", "s", "--home", home, "--listen", LOOPBACK, *arguments]
    return CliRunner().invoke(main, list(map(str, words)))


@pytest.mark.parametrize("alpha", ["0", "-1", "nan", "inf"])
def test_the_scale_of_adapters(tmp_path: Path, alpha: str) -> None:
    done = init(tmp_path / "h", "--preset", "tiny", "--lora-rank", "4", "--lora-alpha", alpha)
    assert "--set" not in done.stderr
    assert (done.exit_code, "--lora-alpha" in done.stderr) == (8, True), done.stderr


@pytest.mark.parametrize("value", ["inf", "-inf", "nan"])
def test_a_value_in_the_weights_that_is_no_number(tmp_path: Path, value: str) -> None:
    from safetensors.torch import load_file, save_file

    weights = model_folder(tmp_path / "m") / "model.safetensors"
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(weights)
    tensors[name][3, 5] = float(value)
    save_file(tensors, weights, metadata={"format": "pt"})
    done = init(tmp_path / "h", "--model", tmp_path / "m")
    assert "causal" not in done.stderr
    assert (done.exit_code, name in done.stderr) == (8, True), done.stderr


def test_every_field_of_a_manifest_names_what_gives_it() -> None:
    """By the manifest's own structure: a new field is --set's, or has an option here."""
    import msgspec

    from xpeer.cli.init import init as command
    from xpeer.drafting import MEASURED, OPTIONS, _fields_of, given_by
    from xpeer.manifest import Manifest

    options = {name for option in command.params for name in option.opts}
    for option in OPTIONS.values():
        assert set(option.replace(" or ", ", ").split(", ")) <= options
    for section in msgspec.structs.fields(Manifest):
        for field in _fields_of(section.type):
            path = f"{section.name}.{field.name}"
            by_hand = section.name not in MEASURED and section.name != "shared_corpus"
            if by_hand and path != "privacy.mode":
                assert given_by(path) == f"--set {path}"
            else:
                assert given_by(path).startswith("--")
                assert "--set" not in given_by(path)
    assert given_by("model.lora.alpha") == "--lora-alpha"
    assert given_by("model.lora.targets[0]") == "--lora-target"
    assert given_by("model.lora.train") == "--lora-train"


@pytest.mark.parametrize(
    ("change", "field"),
    [("end.steps=-1", "end.steps"), ("optimiser.learning_rate=0", "optimiser.learning_rate"),
     ("round.fragments=many", "round.fragments"), ("privacy.epsilon=Infinity", "privacy.epsilon")],
)  # fmt: skip
def test_what_was_set_is_to_be_set_right(tmp_path: Path, change: str, field: str) -> None:
    done = init(tmp_path / "h", "--preset", "tiny", "--set", change)
    assert (done.exit_code, f"--set {field}" in done.stderr) == (8, True), done.stderr


def test_settings_name_the_place_that_they_came_from(tmp_path: Path) -> None:
    from xpeer import config_sources
    from xpeer.errors import ConfigError

    file = tmp_path / "config.toml"
    file.write_text("[training]\nthreads = -1\n")
    with pytest.raises(ConfigError, match=rf"- correct training.threads in {file}$"):
        config_sources.load(file, {})
    with pytest.raises(ConfigError, match=r"- correct XPEER_TRAINING_THREADS$"):
        config_sources.load(file, {"XPEER_TRAINING_THREADS": "-2"})
    with pytest.raises(ConfigError, match=r"- correct --min-peers$"):
        config_sources.load(tmp_path / "no", {}, {"training.min_peers": -1})


def test_every_override_of_a_command_has_its_option() -> None:
    from xpeer.config import settings
    from xpeer.config_sources import OPTIONS

    known = {f"{section}.{key}" for section, key, _ in settings()}
    assert set(OPTIONS) <= known
