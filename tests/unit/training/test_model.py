from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from opacus.grad_sample import GradSampleModule

from xpeer.errors import ConfigError, LocalError
from xpeer.mixing.cut import LINE
from xpeer.training import model as m
from xpeer.training.export import export_hf
from xpeer.training.flat import all_finite
from xpeer.training.kept import config_for_manifest
from xpeer.training.losses import transformers_model
from xpeer.training.records import FILL
from xpeer.training.tokenizer import ByteTokenizer

GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 32,
    "vocab_size": 259,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 259,
    "max_position_embeddings": 32,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "attention_dropout": 0.1,
}
TIED = {**LLAMA, "tie_word_embeddings": True}
CONFIGS = pytest.mark.parametrize("config", [GPT2, LLAMA, TIED], ids=["gpt2", "llama", "tied"])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def records(n: int, tokens: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (n, tokens), generator=torch.Generator().manual_seed(seed))


@CONFIGS
def test_the_seed_fixes_the_weights_and_leaves_the_callers_generator(config: dict[str, Any]):
    before = torch.random.get_rng_state()
    one, two, other = m.build(config, seed=1), m.build(config, seed=1), m.build(config, seed=2)
    assert torch.equal(before, torch.random.get_rng_state())
    assert m.digest(m.read_flat(one)) == m.digest(m.read_flat(two))
    assert m.digest(m.read_flat(one)) != m.digest(m.read_flat(other))
    assert {p.dtype for p in one.parameters()} == {torch.float32}
    assert one.training


@CONFIGS
def test_no_dropout_whatever_the_config_says(config: dict[str, Any]):
    model = m.build(config, seed=1).train()
    first, _ = m.record_losses(model, records(2))
    again, _ = m.record_losses(model, records(2))
    assert torch.equal(first, again)


def test_tied_weights_count_once():
    untied, tied = m.build(LLAMA), m.build(TIED)
    assert m.num_params(untied) - m.num_params(tied) == 259 * 16
    flat = m.FlatParameters(tied)
    flat.write(torch.arange(flat.num_params, dtype=torch.float32))
    inner = transformers_model(tied)
    assert torch.equal(inner.get_input_embeddings().weight, inner.get_output_embeddings().weight)


def test_frozen_parameters_are_not_in_the_vector():
    model = m.build(GPT2)
    before = m.num_params(model)
    first = next(iter(model.parameters()))
    first.requires_grad_(False)
    assert m.num_params(model) == before - first.numel()


@CONFIGS
def test_flat_order_is_that_of_named_parameters(config: dict[str, Any]):
    model = m.build(config, seed=3)
    wanted = torch.cat([p.detach().flatten() for _, p in model.named_parameters()])
    flat = m.FlatParameters(model)
    assert torch.equal(flat.read(), wanted)
    assert flat.num_params == m.num_params(model) == len(wanted)
    out = torch.empty_like(wanted)
    assert flat.read(out) is out
    other = torch.randn(flat.num_params)
    flat.write(other)
    assert torch.equal(m.read_flat(model), other)
    m.write_flat(model, wanted)
    assert torch.equal(flat.read(), wanted)
    assert flat.digest() == m.digest(wanted)


def test_digest_is_a_known_value():
    """Peers on other machines compute the same."""
    values = torch.tensor([0.0, 1.0, -2.5])
    assert m.digest(values) == "eb7c47198c8a0de11a5cb612ff5a6b28a8cc4fcd3c9ea8ae387db7af039dccfb"


SHARED = m.build(GPT2, seed=4)


@CONFIGS
def test_a_flattened_model_computes_trains_and_exports_as_before(
    config: dict[str, Any], tmp_path: Path
):
    model, plain = m.build(config, seed=3), m.build(config, seed=3)
    flat = m.FlatParameters(model)
    optimisers = [torch.optim.AdamW(one.parameters(), fused=True) for one in (model, plain)]
    for one, optimiser in zip((model, plain), optimisers, strict=True):
        losses, _ = m.record_losses(one, records(3))
        losses.sum().backward()
        optimiser.step()
    assert torch.equal(flat.read(), m.read_flat(plain))
    export_hf(model, None, tmp_path / "model")
    assert torch.equal(m.read_flat(m.from_folder(tmp_path / "model")), flat.read())


def test_gradients_of_the_flat_vector_and_back():
    model = m.build(GPT2, seed=4)
    flat = m.FlatParameters(model)
    assert not flat.read_gradients().any()
    values = torch.nn.functional.pad(torch.randn(flat.num_params), (0, -flat.num_params % LINE))
    flat.write_gradients(values)
    assert torch.equal(flat.read_gradients(), values)


def test_fragments_are_copied_out_and_added_to_in_place():
    model = m.build(GPT2, seed=4)
    flat = m.FlatParameters(model, 3)
    before, after = flat.read(), m.read_flat(model)
    for fragment in range(3):
        indices = flat.fragments.indices(fragment)
        inside = indices < flat.num_params
        out = torch.empty(len(indices))
        assert flat.gather(fragment, out) is out
        assert torch.equal(out[inside], before[indices[inside]])
        change = torch.randn(len(indices)) * inside
        flat.add_(fragment, change, 0.5)
        after[indices[inside]] += 0.5 * change[inside]
    assert torch.allclose(m.read_flat(model), after)
    assert not torch.equal(after, before)


def test_parameters_of_several_types_are_refused():
    model = m.build(GPT2, seed=4)
    next(model.parameters()).data = next(model.parameters()).data.double()
    with pytest.raises(LocalError, match="float32"):
        m.FlatParameters(model)


def test_a_vector_of_another_model_is_refused():
    flat = m.FlatParameters(SHARED)
    with pytest.raises(LocalError, match="does not fit"):
        flat.write(torch.zeros(flat.num_params + 1))
    with pytest.raises(LocalError, match="float64"):
        flat.read(torch.zeros(flat.num_params, dtype=torch.float64))


@CONFIGS
def test_losses_are_per_record_and_padding_does_not_count(config: dict[str, Any]):
    model = m.build(config, seed=5)
    ids = records(3)
    ids[1, 7:] = FILL
    losses, counted = m.record_losses(model, ids)
    assert counted.tolist() == [11, 6, 11]
    for i, length in enumerate([12, 7, 12]):
        alone, _ = m.record_losses(model, ids[i : i + 1, :length])
        assert torch.allclose(losses[i], alone[0], rtol=1e-5)
    wanted = (losses.sum() / counted.sum()).item()
    assert m.evaluate(model, ids, micro_batch=2) == pytest.approx(wanted, rel=1e-6)
    assert model.training


@pytest.mark.filterwarnings("ignore:Full backward hook")
@CONFIGS
def test_per_record_gradients_through_opacus_equal_autograd(config: dict[str, Any]):
    model = m.build(config, seed=6)
    flat = m.FlatParameters(model)
    ids = records(4)
    ids[2, 5:] = FILL
    wanted = []
    for record in ids:
        losses, _ = m.record_losses(model, record[None])
        gradients = torch.autograd.grad(losses.sum(), flat.parameters())
        wanted.append(torch.cat([g.flatten() for g in gradients]))
    wrapped = GradSampleModule(model, loss_reduction="sum")
    losses, _ = m.record_losses(wrapped, ids)
    losses.sum().backward()
    samples: list[Any] = [p.grad_sample for p in flat.parameters()]  # type: ignore[attr-defined]
    seen = torch.cat([g.flatten(1) for g in samples], 1)
    assert torch.allclose(seen, torch.stack(wanted), rtol=1e-4, atol=1e-5)
    assert seen.norm(dim=1).min() > 1


def test_evaluate_without_tokens_is_an_error():
    with pytest.raises(ConfigError, match="no text"):
        m.evaluate(SHARED, torch.full((1, 8), FILL))


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({}, "no model_type"),
        ({"model_type": "nosuchmodel"}, "nosuchmodel"),
        ({**GPT2, "n_head": 3}, "can't|no causal"),
        ({**GPT2, "n_layer": "two"}, "n_layer"),
        ({**GPT2, "auto_map": {"AutoModel": "evil.py"}}, "auto_map is refused"),
        ({**GPT2, "quantization_config": {}}, "quantization_config is refused"),
        ({"model_type": "t5", "d_model": 16, "num_layers": 1}, "causal"),
        (
            {
                "model_type": "bert",
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 16,
                "vocab_size": 259,
                "max_position_embeddings": 32,
            },
            "has to predict",
        ),
    ],
)
def test_what_is_no_causal_model_is_a_config_error(config: dict[str, Any], problem: str):
    with pytest.raises(ConfigError, match=problem):
        m.build(config)


@CONFIGS
def test_export_and_load_again(config: dict[str, Any], tmp_path: Path):
    model = m.build(config, seed=7)
    folder = tmp_path / "out" / "model"
    m.export_hf(model, None, folder)
    loaded = m.from_folder(folder)
    assert torch.equal(m.read_flat(loaded), m.read_flat(model))
    theirs, ours = dict(loaded.named_buffers()), dict(model.named_buffers())
    assert {name: buffer.dtype for name, buffer in theirs.items()} == {
        name: buffer.dtype for name, buffer in ours.items()
    }
    assert all(torch.equal(theirs[name], buffer) for name, buffer in ours.items())
    diff = transformers_model(loaded).config.to_diff_dict()
    made = config_for_manifest(diff, transformers_model(loaded))
    rebuilt = m.build(json.loads(json.dumps(made)), seed=8)
    m.write_flat(rebuilt, m.read_flat(loaded))
    ids = records(2)
    assert torch.equal(m.record_losses(rebuilt, ids)[0], m.record_losses(model, ids)[0])
    assert "_name_or_path" not in made
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_export_refuses_a_folder_that_holds_something(tmp_path: Path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="not empty"):
        m.export_hf(SHARED, None, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["letter.txt"]


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(folder: Path, **_: object) -> None:
        (Path(folder) / "half").write_bytes(b"x")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers_model(SHARED), "save_pretrained", full)
    with pytest.raises(LocalError, match="No space left"):
        m.export_hf(SHARED, None, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_loading_names_what_is_wrong(tmp_path: Path):
    with pytest.raises(ConfigError, match="no such folder"):
        m.from_folder(tmp_path / "nowhere")
    folder = tmp_path / "model"
    m.export_hf(SHARED, None, folder)
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(ConfigError, match="is damaged"):
        m.from_folder(folder)
    weights.unlink()
    with pytest.raises(ConfigError, match="no weights"):
        m.from_folder(folder)
    weights.write_bytes(data)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="not an object"):
        m.from_folder(folder)


def test_loading_refuses_missing_weights(tmp_path: Path):
    folder = tmp_path / "model"
    m.export_hf(SHARED, None, folder)
    config = json.loads((folder / "config.json").read_text())
    config["n_layer"] = 3
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"n_layer = 3.* 2 layers"):
        m.from_folder(folder)


def test_tokenizer_and_sequence_have_to_fit():
    m.check_fits(SHARED, 259, 32)
    with pytest.raises(ConfigError, match="260 ids"):
        m.check_fits(SHARED, 260, 32)
    with pytest.raises(ConfigError, match="sequence_tokens = 33"):
        m.check_fits(SHARED, 259, 33)


def test_devices():
    assert m.choose_device("cpu") == (torch.device("cpu"), "")
    assert m.choose_device("auto")[0].type in {"cpu", "cuda", "mps"}
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match=r"training\.device = cuda"):
            m.choose_device("cuda")
    with m.autocast(torch.device("cpu")):
        assert (torch.ones(1, 1) @ torch.ones(1, 1)).dtype == torch.float32


def test_private_gradients_are_never_computed_on_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has no float64."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert m.choose_device("auto") == m.choose_device("mps") == (torch.device("mps"), "")
    device, why = m.choose_device("auto", private=True)
    assert device.type == "cpu"
    assert "float64" in why
    with pytest.raises(ConfigError, match=r"training\.device = mps: .*float64") as raised:
        m.choose_device("mps", private=True)
    assert "cpu" in raised.value.remedy
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert m.choose_device("auto", private=True) == (torch.device("cuda"), "")


def test_generation_is_repeatable_and_leaves_the_mode():
    model = m.build(GPT2, seed=9)
    tokenizer = ByteTokenizer()
    greedy = m.generate(model, tokenizer, "Once upon a time there was a long prompt", 8)
    assert greedy == m.generate(model, tokenizer, "Once upon a time there was a long prompt", 8)
    warm = m.generate(model, tokenizer, "", 8, temperature=1.0, seed=1)
    assert warm == m.generate(model, tokenizer, "", 8, temperature=1.0, seed=1)
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_value_that_is_not_finite_is_found(dtype: torch.dtype) -> None:
    values = torch.linspace(-1e38, 1e38, 1001).to(dtype)
    assert all_finite(values)
    assert all_finite(values[:0])
    for bad in (torch.inf, -torch.inf, torch.nan):
        for place in (0, 500, 1000):
            changed = values.clone()
            changed[place] = bad
            assert not all_finite(changed), (bad, place)
