"""Models in the shapes in which their makers publish them: everything but the width is real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.families.models import _tokenizer
from tests.unit.training.homes import FAST, SENTENCE
from xpeer.cli import main
from xpeer.config import Checkpoint, Data, NodeConfig, Privacy, Training
from xpeer.drafting import draft_manifest
from xpeer.founding_model import LoraOptions, initial_model
from xpeer.identity import Identity
from xpeer.manifest import Manifest
from xpeer.manifest.signed import SignedManifest
from xpeer.trainer.build import assemble
from xpeer.trainer.setup import TrainerSetup
from xpeer.training import adapters
from xpeer.training.losses import transformers_model

_NARROW: Final = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "torch_dtype": "bfloat16", "use_cache": True,
}  # fmt: skip
_LLAMA3: Final = {
    **_NARROW, "model_type": "llama", "vocab_size": 128_256, "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 128_000, "eos_token_id": [128_001, 128_008, 128_009], "head_dim": 8,
    "max_position_embeddings": 131_072, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
}  # fmt: skip
SHAPES: Final[dict[str, dict[str, Any]]] = {
    "Llama-3.2-1B": {**_LLAMA3, "tie_word_embeddings": True},
    "Llama-3.1-8B": {**_LLAMA3, "tie_word_embeddings": False},
    "Qwen3-1.7B": {
        **_NARROW, "model_type": "qwen3", "vocab_size": 151_936, "head_dim": 16,
        "architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True,
        "bos_token_id": 151_643, "eos_token_id": 151_645, "max_position_embeddings": 40_960,
        "rope_theta": 1_000_000, "rope_scaling": None, "use_sliding_window": False,
    },
    "gemma-2-2b": {
        **_NARROW, "model_type": "gemma2", "vocab_size": 256_000, "head_dim": 8,
        "architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "max_position_embeddings": 8192,
        "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma-3-1b-pt": {
        **_NARROW, "model_type": "gemma3_text", "vocab_size": 262_144, "head_dim": 8,
        "architectures": ["Gemma3ForCausalLM"], "query_pre_attn_scalar": 256,
        "sliding_window": 512, "sliding_window_pattern": 6, "rope_local_base_freq": 10_000,
        "rope_theta": 1_000_000, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
        "max_position_embeddings": 32_768, "hidden_activation": "gelu_pytorch_tanh",
    },
    "gemma-3-4b-pt": {
        "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"],
        "torch_dtype": "bfloat16", "boi_token_index": 255_999, "eoi_token_index": 256_000,
        "image_token_index": 262_144, "mm_tokens_per_image": 4, "eos_token_id": [1, 106],
        "text_config": {
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8,
            "num_attention_heads": 2, "num_key_value_heads": 1, "model_type": "gemma3_text",
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
        },
        "vision_config": {
            "hidden_size": 16, "image_size": 28, "intermediate_size": 32, "patch_size": 14,
            "model_type": "siglip_vision_model", "num_attention_heads": 2, "num_hidden_layers": 1,
            "vision_use_head": False,
        },
    },
    "SmolLM2-135M": {
        **_NARROW, "model_type": "llama", "vocab_size": 49_152, "bos_token_id": 0,
        "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, "eos_token_id": 0,
        "max_position_embeddings": 8192, "rope_theta": 100_000, "rope_interleaved": False,
        "is_llama_config": True,
    },
}  # fmt: skip
GENERATION: Final = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
TEMPLATE: Final = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
IDS: Final = torch.arange(3, 35).view(2, 16)


def published(folder: Path) -> Path:
    """A folder as of the hub: config.json by hand, bfloat16 weights in parts, a chat template."""
    config = SHAPES[folder.name]
    rest = {key: value for key, value in config.items() if key != "model_type"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config["model_type"], **rest), dtype=torch.bfloat16
        )
    small = config.get("vocab_size") == 49_152
    model.save_pretrained(folder, max_shard_size="1MB" if small else "3MB")
    assert (folder / "model.safetensors.index.json").exists()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    _tokenizer().save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def home_of(folder: Path, home: Path, lora: LoraOptions | None) -> tuple[TrainerSetup, Manifest]:
    source = initial_model(folder, None, None, lora)
    changes = [*FAST, "optimiser.batch_records=2", "optimiser.sequence_tokens=17"]
    manifest = draft_manifest(
        "test", source, tokenizer=folder, public_text=None, changes=changes, privacy="off"
    )
    (home / "shard").mkdir(parents=True)
    (home / "shard" / "text.txt").write_text(SENTENCE * 20)
    source.write(home / "initial")
    signed = SignedManifest.sign(manifest, Identity.generate())
    (home / "manifest.json").write_bytes(signed.to_bytes())
    (home / "config.toml").write_text(f'[data]\ntokenizer = "{folder}"\n')
    setup = TrainerSetup(
        manifest_path=str(home / "manifest.json"),
        swarm_id=signed.genesis.swarm_id,
        home=str(home),
        peer_id="peer",
        config=NodeConfig(
            data=Data(shard=[str(home / "shard")], tokenizer=str(folder)),
            training=Training(threads=1, device="cpu", validation_records=2),
            checkpoint=Checkpoint(every_s=3600.0),
            privacy=Privacy(register=str(home / "register")),
        ),
    )
    return setup, manifest


def trained_twice(setup: TrainerSetup) -> torch.nn.Module:
    """The model after a step, a checkpoint and a restart."""
    first = assemble(setup)
    first.trainer.run(1)
    first.checkpoints.copy()()
    values = first.trainer.parameters.read()
    first.close()
    again = assemble(setup)
    assert torch.equal(again.trainer.parameters.read(), values)
    again.close()
    return again.model.eval()


def keeps(found: dict[str, Any], said: dict[str, Any]) -> bool:
    """Whether a config has everything that another one says, and may say more."""
    return all(
        keeps(found[key], value) if isinstance(value, dict) else found[key] == value
        for key, value in said.items()
    )


def export(home: Path, to: Path, *more: str) -> None:
    done = CliRunner().invoke(
        main, ["checkpoint", "export", "--home", str(home), "--hf", str(to), *more]
    )
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("name", SHAPES)
def test_init_start_checkpoint_export(tmp_path: Path, name: str) -> None:
    torch.set_num_threads(1)
    folder = published(tmp_path / name)
    setup, manifest = home_of(folder, tmp_path / "home", None)
    assert manifest.model.source == name
    whole = AutoModelForCausalLM.from_pretrained(folder)
    rows = 0 if manifest.model.frozen is None else manifest.model.frozen.num_values
    assert manifest.model.num_params + rows == whole.num_parameters()
    trained = trained_twice(setup)
    export(tmp_path / "home", tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_tensor(tensor).dtype for tensor in names} == {torch.bfloat16}
    parts = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert names == set(parts)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert keeps(config, SHAPES[name]), config
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == GENERATION
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert loaded.config.tie_word_embeddings == SHAPES[name].get("tie_word_embeddings", True)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.copy_(parameter.bfloat16())
        logits = trained(input_ids=IDS).logits
        torch.testing.assert_close(loaded.eval()(input_ids=IDS).logits, logits)
        before = whole.float().eval()(input_ids=IDS).logits
    assert not torch.allclose(logits, before, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21
@pytest.mark.parametrize("name", ["Llama-3.1-8B", "gemma-3-1b-pt", "gemma-3-4b-pt", "SmolLM2-135M"])
def test_adapters_of_a_base_in_bfloat16(tmp_path: Path, name: str) -> None:
    from peft import PeftModel

    torch.set_num_threads(1)
    folder = published(tmp_path / name)
    setup, manifest = home_of(folder, tmp_path / "home", LoraOptions(2))
    assert manifest.model.base_dtype == "bfloat16"
    trained = trained_twice(setup)
    with torch.no_grad():
        logits = trained(input_ids=IDS).logits
    layers = {n for n, _ in adapters.factors(trained)}
    assert len(layers) == 2 * 2 * 7  # A and B of each: none in what sees images
    held = [p for p in transformers_model(trained).parameters() if p.dtype == torch.bfloat16]
    assert sum(p.numel() for p in held) > 0.99 * sum(p.numel() for p in trained.parameters())
    export(tmp_path / "home", tmp_path / "out")
    named = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == name
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=IDS).logits, logits)
    export(tmp_path / "home", tmp_path / "whole", "--merged")
    merged: Any = loaded.merge_and_unload()
    whole = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "whole").named_parameters())
    for tensor, value in merged.named_parameters():
        assert whole[tensor].dtype == torch.bfloat16
        torch.testing.assert_close(whole[tensor].float(), value, rtol=2**-8, atol=1e-6)
