"""A frozen base in 8 or 4 bits: with bitsandbytes where it is installed, and everywhere with its
functions made of torch.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from click.testing import CliRunner
from torch.overrides import TorchFunctionMode

from benchmarks.families.models import FAMILIES, VOCABULARY
from tests.cases.support import model_folder
from tests.pretend_cuda import CUDA
from tests.unit.training.homes import make_homes
from xpeer.cli import main
from xpeer.config import Data, Home
from xpeer.errors import ConfigError, ExitCode
from xpeer.founding_model import LoraOptions, initial_model
from xpeer.manifest.model import Lora, Model
from xpeer.manifest.signed import SignedManifest
from xpeer.needs import Needs
from xpeer.privacy.engines import choose_engine
from xpeer.trainer.build import assemble
from xpeer.training import adapters, trained
from xpeer.training.flat import digest_of
from xpeer.training.held import hold
from xpeer.training.initial import saved_model, trained_model
from xpeer.training.losses import record_losses
from xpeer.training.model import build, from_folder
from xpeer.training.quantised import QuantisedLinear, num_values, quantise

IDS = torch.randint(0, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(3))
LORA = Lora(rank=2, alpha=4.0, seed=5, base_digest="")
KINDS: tuple[Any, ...] = ("int8", "nf4")
NF4 = [
    *(-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
]
"""QLoRA's values (arXiv:2305.14314, appendix E)."""
EIGHT = [
    *torch.linspace(-1, 1, 255)[:127].tolist(),
    0.0,
    *torch.linspace(-1, 1, 255)[127:].tolist(),
]


def quantized(weight: torch.Tensor, table: list[float], block: int) -> tuple[Any, Any]:
    flat = weight.float().flatten()
    blocks = torch.nn.functional.pad(flat, [0, -len(flat) % block]).view(-1, block)
    scales = blocks.abs().amax(1)
    scaled = blocks / scales.clamp(min=1e-30).unsqueeze(1)
    codes = (scaled.unsqueeze(2) - torch.tensor(table)).abs().argmin(2).flatten()[: len(flat)]
    return codes.to(torch.uint8), scales


def dequantized(codes: torch.Tensor, table: list[float], state: Any) -> torch.Tensor:
    flat = torch.tensor(table)[codes.long().flatten()]
    scales = state.absmax.repeat_interleave(state.blocksize)[: len(flat)]
    values: torch.Tensor = (flat * scales).to(state.dtype)
    return values


def library_of_torch() -> Any:
    """`bitsandbytes.functional`, as far as it is used; 4-bit codes are not packed tightly."""

    def quantize_4bit(weight: Any, blocksize: int, quant_type: str) -> Any:
        assert quant_type == "nf4"
        codes, scales = quantized(weight, NF4, blocksize)
        codes = torch.nn.functional.pad(codes, [0, len(codes) % 2]).view(-1, 2)
        return (codes[:, :1] << 4) | codes[:, 1:], SimpleNamespace(absmax=scales)

    def dequantize_4bit(codes: Any, state: Any) -> torch.Tensor:
        both = torch.cat([codes >> 4, codes & 15], 1).flatten()[: state.shape.numel()]
        return dequantized(both, NF4, state).view(state.shape)

    def quantize_blockwise(weight: Any, code: Any, blocksize: int) -> Any:
        assert torch.allclose(code, torch.tensor(EIGHT))
        codes, scales = quantized(weight, EIGHT, blocksize)
        return codes.view(weight.shape), SimpleNamespace(absmax=scales)

    def dequantize_blockwise(codes: Any, state: Any) -> torch.Tensor:
        assert codes.device == state.code.device == state.absmax.device, "a kernel reads one device"
        return dequantized(codes, EIGHT, state).view(codes.shape)

    return SimpleNamespace(
        create_linear_map=lambda: torch.tensor(EIGHT),
        QuantState=SimpleNamespace,
        quantize_4bit=quantize_4bit,
        dequantize_4bit=dequantize_4bit,
        quantize_blockwise=quantize_blockwise,
        dequantize_blockwise=dequantize_blockwise,
    )


INSTALLED = importlib.util.find_spec("bitsandbytes") is not None
REAL = pytest.param(
    "real", marks=pytest.mark.skipif(not INSTALLED, reason="bitsandbytes is not installed")
)


@pytest.fixture(params=["of torch", REAL], autouse=True)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "real":
        monkeypatch.setitem(sys.modules, "bitsandbytes.functional", library_of_torch())
    return str(request.param)


def twins(family: str, kind: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A quantised base with adapters, and a float32 model with the same values."""
    held = hold(build(FAMILIES[family], seed=1), torch.bfloat16)
    usual: Any = build(FAMILIES[family], seed=1)
    usual.load_state_dict({name: value.float() for name, value in held.state_dict().items()})
    quantise(held, kind, 64)
    for name, module in held.named_modules():
        if isinstance(module, QuantisedLinear):
            values, layer = module.values(torch.float32), usual.get_submodule(name)
            conv = type(layer).__name__ == "Conv1D"
            layer.weight.data = values.T.contiguous() if conv else values
    made = adapters.adapt(held, LORA), adapters.adapt(usual, LORA)
    for twin in made:
        for name, parameter in twin.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.01)
    return made


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    record_losses(model, IDS)[0].sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma3, text", "gpt2", "mixtral"])
def test_it_computes_as_float32_with_the_same_values(family: str, kind: Any) -> None:
    torch.set_num_threads(1)
    ours, theirs = twins(family, kind)
    assert num_values(ours) > 1000
    with torch.no_grad():
        torch.testing.assert_close(*(record_losses(twin, IDS)[0] for twin in (ours, theirs)))
    pairs = list(zip(gradients(ours), gradients(theirs), strict=True))
    assert pairs
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kind", "bits", "error"), [("int8", 8.5, 0.01), ("nf4", 4.5, 0.12)])
def test_what_is_lost_and_what_is_saved(kind: Any, bits: float, error: float) -> None:
    model: Any = hold(build(FAMILIES["llama"], seed=1), torch.bfloat16)
    before = copy.deepcopy(model)
    output: Any = model.get_output_embeddings()
    quantise(model, kind, 64)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantisedLinear)}
    assert layers
    assert not isinstance(output, QuantisedLinear)
    size = sum(m.codes.nbytes + m.scales.nbytes for m in layers.values())
    assert size == pytest.approx(bits / 8 * num_values(model), rel=0.01)
    for name, module in layers.items():
        weight: Any = before.get_submodule(name).weight.float()
        lost = (module.values(torch.float32) - weight).square().mean().sqrt()
        assert 0 < lost < error * weight.std()


@pytest.mark.parametrize("kind", KINDS)
def test_every_engine_is_right_about_a_quantised_base(kind: Any) -> None:
    model, _ = twins("llama", kind)
    chosen = choose_engine(model, record_losses, IDS)  # compares them with plain autograd
    assert "refused" not in chosen.reason


class _MovedToCuda(TorchFunctionMode):
    """Within its `with` block tensors are on a GPU that is not there, once they were moved to it.

    Attributes:
        moved: tensors that are there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[torch.Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.to and args[1:] == (CUDA,):
            self.moved.append(args[0].clone())
            return self.moved[-1]
        if func == torch.Tensor.device.__get__ and any(args[0] is each for each in self.moved):
            return CUDA
        return func(*args, **(kwargs or {}))


def test_the_256_values_of_8_bits_follow_the_codes_to_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", library_of_torch())
    model = quantise(hold(build(FAMILIES["llama"], seed=1), torch.bfloat16), "int8", 64)
    one, other = [m for m in model.modules() if isinstance(m, QuantisedLinear)][:2]
    expected = [each.values(torch.float32) for each in (one, other)]
    with _MovedToCuda() as gpu:
        for each in (one, other):
            each.codes, each.scales = each.codes.to(CUDA), each.scales.to(CUDA)
        made = [each.values(torch.float32) for each in (one, other)]
    assert len(gpu.moved) == 5  # once for all layers
    for values, wanted in zip(made, expected, strict=True):
        assert torch.equal(values, wanted)


def test_under_autocast_nothing_but_codes_is_kept_for_the_backward_pass() -> None:
    model, _ = twins("llama", "nf4")
    layer = next(m for m in model.modules() if isinstance(m, QuantisedLinear))
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    x = torch.ones(2, layer.in_features, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        assert out.dtype == torch.bfloat16
        assert not kept
    out.float().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(
        x.grad[0], layer.values(torch.bfloat16).float().sum(0), rtol=0.02, atol=0.02
    )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21
def test_a_home_with_a_quantised_base_trains_restarts_and_exports(tmp_path: Path) -> None:
    options = LoraOptions(2, base_dtype="nf4")
    setup = make_homes(tmp_path, 1, privacy="record", changes=("end.steps=50",), lora=options)[0]
    manifest = SignedManifest.load(Path(setup.manifest_path)).open()
    assert (manifest.model.base_dtype, manifest.model.base_block) == ("nf4", 64)
    base = Path(setup.home) / "initial"
    assert manifest.model.lora is not None
    held = from_folder(base, dtype=torch.bfloat16)
    assert digest_of(held, torch.bfloat16) == manifest.model.lora.base_digest
    first = assemble(setup)
    assert first.mechanism.engine == "book-keeping"
    assert num_values(first.model) > 0
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
    assert (named["dtype"], named["block"]) == ("nf4", 64)
    assert "as bfloat16" in named["of"]
    made = trained.from_export(tmp_path / "adapters", base)
    with torch.no_grad():
        torch.testing.assert_close(made.model(input_ids=IDS).logits, expected)
    goes_on = initial_model(base, None, None, LoraOptions(folder=tmp_path / "adapters"))
    assert goes_on.base_dtype == "nf4"
    other = LoraOptions(folder=tmp_path / "adapters", base_dtype="bfloat16")
    assert initial_model(base, None, None, other).base_dtype == "bfloat16"

    done = CliRunner().invoke(main, [*command[:-1], str(tmp_path / "whole"), "--merged"])
    assert done.exit_code == 0, done.output
    assert "merged into the unquantised weights" in done.output
    home = Home(Path(setup.home))
    plain = trained_model(manifest, home, "", saved_model(home)[0], quantised=False).eval()
    assert num_values(plain) == 0
    with torch.no_grad():
        logits = from_folder(tmp_path / "whole").eval()(input_ids=IDS).logits
        torch.testing.assert_close(logits, plain(input_ids=IDS).logits, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(logits, expected, rtol=1e-3, atol=1e-4)


def test_init_tries_it(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m")
    command = [
        "init",
        "--home",
        tmp_path / "h",
        "--swarm",
        "s",
        "--tokenizer",
        "bytes",
        "--model",
        folder,
    ]
    more = ["--lora-rank", "2", "--base-dtype", "int8", "--set", "optimiser.sequence_tokens=32"]
    done = CliRunner().invoke(main, [str(x) for x in (*command, *more)])
    assert done.exit_code == 0, done.output
    assert "holds the frozen weights in int8" in done.output
    assert "xpeer[quantised]" in done.output


def test_without_the_library_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ConfigError, match=r"model\.base_dtype.*bitsandbytes") as raised:
        quantise(hold(build(FAMILIES["llama"], seed=1), torch.bfloat16), "nf4", 64)
    assert "xpeer[quantised]" in raised.value.remedy
    command = ["init", "--home", tmp_path / "h", "--swarm", "s", "--preset", "tiny"]
    more = ["--lora-rank", "2", "--base-dtype", "nf4"]
    refused = CliRunner().invoke(main, [str(x) for x in (*command, *more)])
    assert refused.exit_code == ExitCode.BAD_CONFIG
    assert "xpeer[quantised]" in refused.output
    assert not (tmp_path / "h" / "manifest.json").exists()


def test_a_joiner_is_told_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    needs = Needs(base_model="ab" * 32, quantised=True)
    said = " ".join(needs.unmet(Data(base_model=str(model_folder(tmp_path / "m"))), Home(tmp_path)))
    assert "bitsandbytes: install xpeer[quantised]" in said
    whole = Needs(base_model="ab" * 32)  # all that older versions know, and no more
    assert msgspec.json.encode(whole).decode() == (
        f'{{"tokenizer":"","base_model":"{"ab" * 32}","source":""}}'
    )


def test_adapters_for_blocks_that_nobody_makes_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trained, "_tokenizer_of", lambda *_: None)
    folder = model_folder(tmp_path / "m")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "base_model.json").write_text('{"blake2b_256": "", "dtype": "nf4", "block": 7}')
    with pytest.raises(ConfigError, match=r"base_model\.json can't be read.*block"):
        trained.from_export(folder, folder)


def test_type_and_block_belong_together() -> None:
    for dtype, block in (("nf4", 0), ("bfloat16", 64)):
        with pytest.raises(ValueError, match=r"model\.base_block"):
            Model({}, 1, "", LORA, base_dtype=dtype, base_block=block).check()  # type: ignore[arg-type]
