"""Models that see images, too: their language model is trained, or the refusal says how to get it.

Gemma 3 of 4 billion parameters and more, as a whole, is in `test_real_shapes`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)

from benchmarks.families.models import _tokenizer
from tests.unit.training.test_real_shapes import SHAPES, export, home_of, trained_twice
from xpeer.config import Home
from xpeer.errors import ConfigError
from xpeer.estimate.fit import _size_in
from xpeer.founding_model import LoraOptions, initial_model
from xpeer.trainer.arena import Layout
from xpeer.trainer.build import assemble
from xpeer.training import targets
from xpeer.training.checkpoint import load_latest
from xpeer.training.export_config import completed
from xpeer.training.handed_out import widened
from xpeer.training.kept import Source, config_for_manifest
from xpeer.training.model import build, check_fits, context_tokens

PAGE: Final = Path(__file__).parents[3] / "docs" / "finetune.md"
_TEXT: Final = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 300, "max_position_embeddings": 64,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
_IMAGES: Final = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
_QWEN: Final = {
    "hidden_size": 16, "out_hidden_size": 16, "intermediate_size": 32, "depth": 1, "num_heads": 2,
    "patch_size": 14,
}  # fmt: skip
_SECTIONS: Final = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e6}
GEMMA: Final[dict[str, Any]] = {
    **SHAPES["gemma-3-4b-pt"],
    "image_token_index": 299,
    "text_config": {**SHAPES["gemma-3-4b-pt"]["text_config"], **_TEXT},
}
MISTRAL: Final[dict[str, Any]] = {
    "model_type": "mistral3", "image_token_index": 299, "tie_word_embeddings": False,
    "text_config": {"model_type": "mistral", "tie_word_embeddings": False, **_TEXT},
    "vision_config": {"model_type": "pixtral", **_IMAGES, "head_dim": 8},
}  # fmt: skip
LLAMA4: Final[dict[str, Any]] = {
    "model_type": "llama4", "image_token_index": 299,
    "text_config": {
        "model_type": "llama4_text", **_TEXT, "intermediate_size_mlp": 32, "num_local_experts": 2,
        "attention_chunk_size": 32,
    },
    "vision_config": {
        "model_type": "llama4_vision_model", **_IMAGES, "vision_output_dim": 16,
        "projector_input_dim": 16, "projector_output_dim": 16,
    },
}  # fmt: skip
QWEN35: Final[dict[str, Any]] = {
    "model_type": "qwen3_5", "image_token_id": 299, "video_token_id": 298,
    "text_config": {
        "model_type": "qwen3_5_text", **_TEXT,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
        "linear_num_value_heads": 2, "rope_parameters": {**_SECTIONS, "mrope_interleaved": True},
    },
    "vision_config": {"model_type": "qwen3_5_vision", **_QWEN, "num_position_embeddings": 16},
}  # fmt: skip
QWEN25: Final[dict[str, Any]] = {
    "model_type": "qwen2_5_vl",
    "text_config": {"model_type": "qwen2_5_vl_text", **_TEXT, "rope_parameters": _SECTIONS},
    "vision_config": {"model_type": "qwen2_5_vl_vision", **_QWEN},
}
QWEN3: Final[dict[str, Any]] = {
    "model_type": "qwen3_vl",
    "text_config": {"model_type": "qwen3_vl_text", **_TEXT, "rope_parameters": _SECTIONS},
    "vision_config": {"model_type": "qwen3_vl_vision", **_QWEN},
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def whole(folder: Path, config: dict[str, Any]) -> Path:
    """A folder with all parts, as it is published."""
    rest = {key: value for key, value in config.items() if key != "model_type"}
    torch.manual_seed(0)
    made: Any = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(config["model_type"], **rest)
    )
    made.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def alone(source: Path, target: Path) -> Path:
    """The language model of a folder, as the page says."""
    (script,) = re.findall(
        r"((?:^    (?!\w\$).*\n)*^    .*save_pretrained.*\n)", PAGE.read_text(), re.M
    )
    lines = "".join(line[4:] for line in script.splitlines(keepends=True))
    lines = lines.replace("/models/whole", str(source)).replace("/models/base", str(target))
    exec(compile(lines, str(PAGE), "exec"), {})
    return target


def run(folder: Path, home: Path, lora: LoraOptions | None) -> None:
    """Found, train, save, restart, export, and load with transformers."""
    setup, manifest = home_of(folder, home, lora)
    trained = trained_twice(setup)
    merged = [] if lora is None else ["--merged"]
    export(home, home / "out", *merged)
    loaded: Any = AutoModelForCausalLM.from_pretrained(home / "out", dtype=torch.float32).eval()
    assert loaded.config.model_type == manifest.model.config["model_type"]
    ids = torch.arange(3, 35).view(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(input_ids=ids).logits, trained(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )


def test_names_are_of_layers_of_the_language_model() -> None:
    model = build(GEMMA, seed=1)
    names = targets.names_of(model)
    assert len(names) == 2 * 7 + 1
    assert all("vision" not in name and "projector" not in name for name in names)
    found = targets.find(model, [])
    assert {"gate_proj", "up_proj", "down_proj", "o_proj"} <= set(found)  # no other part has these
    assert len(found) == 4 + 2 * 3
    assert targets.find(model, ["down_proj"]) == ["down_proj"]
    assert targets.find(model, ["q_proj"]) == [
        f"model.language_model.layers.{n}.self_attn.q_proj" for n in range(2)
    ]
    with pytest.raises(ConfigError, match=r"q_proj \(2\)"):
        targets.find(model, ["fc1"])
    text = build({"model_type": "gemma3_text", **GEMMA["text_config"]}, seed=1)
    assert targets.find(text, []) == []


def test_limits_are_those_of_the_language_model() -> None:
    model = build(GEMMA, seed=1)
    assert context_tokens(model) == 64
    assert [_size_in(model, name, 0) for name in ("hidden_size", "num_hidden_layers")] == [16, 2]
    with pytest.raises(ConfigError, match="64 positions"):
        check_fits(model, 300, 65)


def test_a_config_inside_is_completed_too_and_says_what_is_tied() -> None:
    model: Any = build(GEMMA, seed=1)
    kept = config_for_manifest(GEMMA, model)
    assert Source(kept).torch_dtype == torch.bfloat16
    inside = {key: value for key, value in GEMMA.items() if key != "torch_dtype"}
    inside["text_config"] = {**GEMMA["text_config"], "torch_dtype": "bfloat16"}
    assert Source(config_for_manifest(inside, model)).torch_dtype == torch.bfloat16
    made = Source(kept).config_json(model, untied=True)
    text = made["text_config"]
    assert text["rope_theta"] == 1e6  # transformers 4 would take another default without a word
    assert text["rope_scaling"]["factor"] == 8.0
    assert (made["tie_word_embeddings"], text["tie_word_embeddings"]) == (False, False)
    assert "tie_word_embeddings" not in GEMMA["text_config"]
    assert completed(made, model.config.to_dict(), "bfloat16")["text_config"] == text


def test_what_would_load_something_else_is_refused_inside_too() -> None:
    text = {**GEMMA["text_config"], "quantization_config": {"quant_method": "bitsandbytes"}}
    with pytest.raises(ConfigError, match="quantization_config is refused"):
        build({**GEMMA, "text_config": text})


@pytest.mark.parametrize("lora", [None, LoraOptions(2)], ids=["full", "adapters"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_transformers_loads_as_a_language_model_alone_is_trained_so(
    tmp_path: Path, lora: LoraOptions | None
) -> None:
    """Its config is then the language model's."""
    folder = whole(tmp_path / "whole", QWEN35)
    made = initial_model(folder, None, None)
    assert made.config["model_type"] == "qwen3_5_text"
    assert "vision_config" not in made.config
    assert made.config["vocab_size"] == 300
    run(folder, tmp_path / "home", lora)


def test_what_sees_images_is_given_to_joiners_in_the_type_of_its_source(tmp_path: Path) -> None:
    """A region in the form of the manifest holds it exactly, in half the bytes; so does a file."""
    torch.manual_seed(0)
    rest = {key: value for key, value in GEMMA.items() if key != "model_type"}
    made: Any = AutoModelForImageTextToText.from_config(AutoConfig.for_model("gemma3", **rest))
    made.bfloat16().save_pretrained(tmp_path / "whole")
    _tokenizer().save_pretrained(tmp_path / "whole")
    setup, manifest = home_of(tmp_path / "whole", tmp_path / "home", None)
    form, images = manifest.state_form, manifest.model.frozen
    assert images is not None
    assert any("vision" in name for name in images.parameters)
    assert (images.dtype, form.num_frozen) == ("bfloat16", images.num_values)
    assert form.num_bytes == 4 * manifest.model.num_params + 2 * images.num_values
    donor = assemble(setup)
    region = memoryview(bytearray(Layout.of(manifest).state_bytes))
    own, kept = widened(region, form, "float32")
    donor.trainer.show(own)()
    kept.copy_(donor.frozen.read())
    donor.close()
    joiner = assemble(msgspec.structs.replace(setup, initial="awaited"))
    joiner.frozen.replace(widened(region, form)[1])
    for name, value in donor.model.named_parameters():
        if name in images.parameters:
            assert torch.equal(joiner.model.get_parameter(name), value)
    joiner.close()
    trained_twice(setup)
    saved, _ = load_latest(Home(Path(setup.home)).checkpoints)
    assert saved is not None
    assert saved.frozen.dtype == torch.bfloat16


@pytest.mark.parametrize("config", [MISTRAL, LLAMA4], ids=["mistral3", "llama4"])
def test_others_are_refused_until_their_language_model_is_saved_alone(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    folder = whole(tmp_path / "whole", config)
    with pytest.raises(ConfigError) as refused:
        initial_model(folder, None, None)
    assert "language model" in refused.value.problem
    assert "docs/finetune.md" in refused.value.remedy
    assert "A language model inside of another" in PAGE.read_text(encoding="utf-8")
    text = alone(folder, tmp_path / "base")
    before: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    after: Any = AutoModelForCausalLM.from_pretrained(text, dtype=torch.float32).eval()
    ids = torch.arange(3, 35).view(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(after(input_ids=ids).logits, before(input_ids=ids).logits)
    assert AutoTokenizer.from_pretrained(text)("a b").input_ids
    run(text, tmp_path / "home", None)


@pytest.mark.parametrize("config", [QWEN25, QWEN3], ids=["qwen2_5_vl", "qwen3_vl"])
def test_a_language_model_that_transformers_has_no_class_for_is_named(
    config: dict[str, Any],
) -> None:
    kind = config["text_config"]["model_type"]
    with pytest.raises(
        ConfigError, match=rf"nor of the language model in it \({kind}\)"
    ) as refused:
        build(config)
    assert "for text alone" in refused.value.remedy


def test_a_model_for_images_alone_is_no_language_model() -> None:
    with pytest.raises(ConfigError, match="no causal language model of type siglip_vision_model"):
        build({"model_type": "siglip_vision_model", **_IMAGES})
