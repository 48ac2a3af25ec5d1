"""A frozen base held in bfloat16 is computed with as a float32 model of the same values is."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from benchmarks.families.models import FAMILIES, VOCABULARY
from tests.cases.support import model_folder
from tests.unit.training.homes import make_homes
from xpeer.cli import main
from xpeer.errors import ConfigError, ExitCode
from xpeer.founding_model import LoraOptions, initial_model
from xpeer.identity import blake2b
from xpeer.manifest.model import Lora
from xpeer.manifest.signed import SignedManifest
from xpeer.privacy.engines import choose_engine
from xpeer.trainer.build import assemble
from xpeer.training import adapters, trained
from xpeer.training.flat import digest, digest_of, read_flat
from xpeer.training.held import hold, release
from xpeer.training.losses import record_losses
from xpeer.training.model import build, from_folder, read_config

IDS = torch.randint(0, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(3))
KINDS = ("llama", "qwen3", "gemma2", "gemma3, text", "gpt2", "opt", "mixtral")
LORA = Lora(rank=2, alpha=4.0, seed=5, base_digest="")


def rounded(model: torch.nn.Module) -> torch.nn.Module:
    """A float32 model with the values that bfloat16 can express."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    record_losses(model, IDS)[0].sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", KINDS)
def test_losses_and_gradients_are_those_of_float32(family: str) -> None:
    torch.set_num_threads(1)
    model = build(FAMILIES[family], seed=1)
    usual = rounded(copy.deepcopy(model))
    before = sum(p.nbytes for p in model.parameters())
    hold(model, torch.bfloat16)
    large = sum(p.nbytes for p in usual.parameters() if p.dim() == 2)
    assert sum(p.nbytes for p in model.parameters()) < before - 0.3 * large
    twins = [adapters.adapt(m, LORA) for m in (usual, model)]
    for twin in twins:
        for name, parameter in twin.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.01)
    with torch.no_grad():
        assert torch.equal(*(record_losses(twin, IDS)[0] for twin in twins))
    theirs, ours = (gradients(twin) for twin in twins)
    assert len(ours) == len(theirs) > 0
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_under_autocast_the_weights_are_used_as_they_are() -> None:
    model = build(FAMILIES["llama"], seed=1)
    usual = rounded(copy.deepcopy(model))
    hold(model, torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (m(input_ids=IDS, use_cache=False).logits for m in (model, usual))
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert torch.equal(ours, theirs)


def test_release_gives_the_usual_model_back() -> None:
    model = build(FAMILIES["gemma2"], seed=1)
    usual = rounded(copy.deepcopy(model))
    release(hold(model, torch.bfloat16))
    assert [type(m) for m in model.modules()] == [type(m) for m in usual.modules()]
    assert torch.equal(read_flat(model), read_flat(usual))


def test_every_engine_is_right_about_a_held_base() -> None:
    model = adapters.adapt(hold(build(FAMILIES["llama"], seed=1), torch.bfloat16), LORA)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02)
    chosen = choose_engine(model, record_losses, IDS)  # compares them with plain autograd
    assert "refused" not in chosen.reason


def test_the_hash_is_of_the_values_in_their_type() -> None:
    model = build(FAMILIES["llama"], seed=1)
    assert digest_of(model) == digest(read_flat(model))
    bits = read_flat(model).view(torch.int32).numpy().astype(np.int64)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # round to nearest, ties to even
    expected = blake2b(nearest.astype("<u2").tobytes()).hex()
    assert digest_of(model, torch.bfloat16) == expected
    assert digest_of(hold(model, torch.bfloat16), torch.bfloat16) == expected


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_a_folder_is_loaded_as_the_rounded_model(tmp_path: Path, family: str) -> None:
    folder = model_folder(tmp_path / "m", family)
    held = from_folder(folder, dtype=torch.bfloat16)
    usual = rounded(from_folder(folder))
    assert sum(p.nbytes for p in held.parameters()) < 0.55 * sum(
        p.nbytes for p in usual.parameters()
    )
    buffers = dict(usual.named_buffers())
    assert {n: b.dtype for n, b in held.named_buffers()} == {n: b.dtype for n, b in buffers.items()}
    assert all(torch.equal(b, buffers[n]) for n, b in held.named_buffers())
    with torch.no_grad():
        assert torch.equal(record_losses(held, IDS)[0], record_losses(usual, IDS)[0])


def in_16_bits(folder: Path) -> Path:
    """Save a folder's model again, in bfloat16 and in parts."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    to = folder.with_name("parts")
    model.save_pretrained(to, max_shard_size="20KB")
    assert (to / "model.safetensors.index.json").exists()
    return to


def test_init_holds_16_bit_weights_in_16_bits(tmp_path: Path) -> None:
    folder = in_16_bits(model_folder(tmp_path / "m"))
    assert initial_model(folder, None, None, LoraOptions(2)).base_dtype == "bfloat16"
    assert initial_model(folder, None, None).base_dtype == "float32"
    assert initial_model(tmp_path / "m", None, None, LoraOptions(2)).base_dtype == "float32"
    source = initial_model(folder, None, None, LoraOptions(2, base_dtype="float32"))
    assert source.base_dtype == "float32"

    def init(*more: str | Path) -> Any:
        common = ["init", "--home", tmp_path / "h", "--swarm", "s", "--tokenizer", "bytes"]
        return CliRunner().invoke(main, [str(x) for x in (*common, "--model", folder, *more)])

    refused = init("--base-dtype", "bfloat16")
    assert (refused.exit_code, "--lora-rank" in refused.output) == (ExitCode.BAD_CONFIG, True)
    refused = init("--set", "model.base_dtype=bfloat16")
    assert (refused.exit_code, "set by hand" in refused.output) == (ExitCode.BAD_CONFIG, True)
    done = init("--lora-rank", "2", "--set", "optimiser.sequence_tokens=32")
    assert done.exit_code == 0, done.output
    assert "holds the frozen weights in bfloat16" in done.output
    manifest = SignedManifest.load(tmp_path / "h" / "manifest.json").open()
    assert manifest.model.base_dtype == "bfloat16"
    assert read_config(tmp_path / "h" / "initial")["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_init_holds_a_pickle_as_its_config_says(tmp_path: Path, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    folder = model_folder(tmp_path / "m")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    held = initial_model(folder, None, None, LoraOptions(2)).base_dtype
    assert held == str(dtype).removeprefix("torch.")


def test_full_weights_are_never_held(tmp_path: Path) -> None:
    setup = make_homes(tmp_path, 1)[0]
    manifest = SignedManifest.load(Path(setup.manifest_path)).open()
    model = msgspec.structs.replace(manifest.model, base_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"model\.base_dtype"):
        msgspec.structs.replace(manifest, model=model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21
def test_a_home_with_a_held_base_trains_restarts_and_exports(tmp_path: Path) -> None:
    options = LoraOptions(2, base_dtype="bfloat16")
    setup = make_homes(tmp_path, 1, privacy="record", changes=("end.steps=50",), lora=options)[0]
    first = assemble(setup)
    assert first.mechanism.engine == "book-keeping"
    assert {p.dtype for p in first.model.parameters()} == {torch.bfloat16, torch.float32}
    first.trainer.run(2)
    values = first.trainer.parameters.read()
    first.checkpoints.copy()()
    first.close()
    again = assemble(setup)
    assert torch.equal(again.trainer.parameters.read(), values)
    with torch.no_grad():
        expected = again.model.eval()(input_ids=IDS).logits
    again.close()
    command = ["checkpoint", "export", "--home", setup.home, "--hf", str(tmp_path / "adapters")]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    named = json.loads((tmp_path / "adapters" / "base_model.json").read_text())
    assert named["dtype"] == "bfloat16"
    base = Path(setup.home) / "initial"
    made = trained.from_export(tmp_path / "adapters", base)
    with torch.no_grad():
        assert torch.equal(made.model(input_ids=IDS).logits, expected)
    other = model_folder(tmp_path / "other")
    with pytest.raises(ConfigError):
        trained.from_export(tmp_path / "adapters", other)
    for more, dtype in ((["--dtype", "float32"], torch.float32), ([], torch.float32)):
        folder = tmp_path / f"whole{len(more)}"
        done = CliRunner().invoke(main, [*command[:-1], str(folder), "--merged", *more])
        assert done.exit_code == 0, done.output
        with torch.no_grad():
            logits = from_folder(folder, dtype=dtype).eval()(input_ids=IDS).logits
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
